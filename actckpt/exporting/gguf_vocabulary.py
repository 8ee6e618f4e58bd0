"""The vocabulary of a GGUF file, of a tokenizer of Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from actckpt.errors import WeightsExportError
from actckpt.exporting.source import Source

# GPT-2's is within byte-level pre-tokenizers
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# what llama.cpp knows by a name: (how text is split, whether whole words come before merges)
_SPLITS = {((), False): "gpt-2", ((_LLAMA3,), True): "llama-bpe"}
# the score of what no merge makes
_NO_MERGE = -1e6
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def check_vocabulary(tokenizer: Any, source: Source) -> None:
    """That a tokenizer can be written, and is none of more tokens than the model has.

    Raises:
        WeightsExportError: it cannot.
    """
    if tokenizer is None:
        return
    size = _size(source)
    if len(tokenizer) > size:
        raise WeightsExportError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {size}: pass the one that the "
            "model was trained with"
        )
    _model_of(tokenizer)


def add_vocabulary(writer: Any, tokenizer: Any, source: Source) -> None:
    """Writes the tokens, how text becomes them, and which have a meaning; or that there are none.

    Args:
        writer: a ``GGUFWriter``.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    data, kind, split = _model_of(tokenizer)
    vocabulary: Mapping[str, int] = data["model"]["vocab"]
    added = {t["id"]: t for t in data.get("added_tokens", ())}
    names = {number: text for text, number in vocabulary.items()}
    names |= {number: t["content"] for number, t in added.items()}
    size = _size(source)
    tokens = [names.get(n, f"[PAD{n}]") for n in range(size)]
    types = [_type(n, names, added, tokenizer, kind) for n in range(size)]
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    if kind == "gpt2":
        writer.add_tokenizer_pre(split)
        writer.add_token_merges(merges)
    else:
        scores: dict[str, float] = {}
        for rank, merge in enumerate(merges):
            scores.setdefault(merge.replace(" ", "", 1), -float(rank))
        writer.add_token_scores([scores.get(text, _NO_MERGE) for text in tokens])
        writer.add_add_space_prefix(_begins_with_space(data))
    for special in ("bos", "eos", "unk", "pad", "sep", "mask"):
        number = getattr(tokenizer, f"{special}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{special}_token_id")(int(number))
    # what the tokenizer itself puts before and after
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)


def _size(source: Source) -> int:
    config: Any = source.model.config  # type: ignore[union-attr]
    return int(config.vocab_size)


def _type(
    number: int,
    names: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    tokenizer: Any,
    kind: str,
) -> int:
    if number not in names:
        return _UNUSED
    text = names[number]
    if number in added:
        if number == tokenizer.unk_token_id and kind == "llama":
            return _UNKNOWN
        return _CONTROL if added[number]["special"] else _USER
    if kind == "llama" and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return _BYTE
    return _NORMAL


def _model_of(tokenizer: Any) -> tuple[dict[str, Any], str, str]:
    """(its JSON, how llama.cpp calls its kind, how it calls the splitting of text before).

    Raises:
        WeightsExportError: llama.cpp has no such tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise WeightsExportError(
            f"{type(tokenizer).__name__} is no fast tokenizer, whose vocabulary could be read: "
            "pass AutoTokenizer.from_pretrained(…)"
        )
    data: dict[str, Any] = json.loads(backend.to_str())
    model, before = data["model"], _parts(data.get("pre_tokenizer"), "pretokenizers")
    changes = _parts(data.get("normalizer"), "normalizers")
    if model["type"] == "BPE" and model.get("byte_fallback"):
        spaces = {part["type"] for part in (*changes, *before)} - {
            "Prepend",
            "Replace",
            "Metaspace",
        }
        if not spaces:
            return data, "llama", ""
    splits = tuple(part["pattern"].get("Regex", "") for part in before if part["type"] == "Split")
    found = _SPLITS.get((splits, bool(model.get("ignore_merges"))))
    bytes_last = bool(before) and before[-1]["type"] == "ByteLevel"
    if model["type"] == "BPE" and bytes_last and found is not None and not changes:
        level = before[-1]
        # either splits, not both
        if not level["add_prefix_space"] and level.get("use_regex", True) != bool(splits):
            return data, "gpt2", found
    kinds = ", ".join(part["type"] for part in (*changes, *before)) or "nothing"
    raise WeightsExportError(
        f"a tokenizer of {model['type']} after {kinds} has no name in llama.cpp that is known "
        "here; byte-level BPE split as GPT-2's or Llama-3's has, and BPE with byte fallback: "
        'export without tokenizer=, or format="huggingface"'
    )


def _parts(stage: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    """The steps of a stage of a tokenizer."""
    if stage is None:
        return []
    found: list[Mapping[str, Any]] = stage.get(inside, [stage])
    return found


def _begins_with_space(data: Mapping[str, Any]) -> bool:
    """Whether a space is put before text."""
    parts = _parts(data.get("normalizer"), "normalizers")
    parts = [*parts, *_parts(data.get("pre_tokenizer"), "pretokenizers")]
    return any(
        part["type"] == "Prepend" or part.get("prepend_scheme", "never") != "never"
        for part in parts
    )
