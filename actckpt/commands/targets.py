"""The models that the command line can name: ``module:function``, or a Hugging Face model type."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from actckpt.errors import TargetError

# heads in the order they are tried, with transformers' mapping of model types and its Auto class;
# BART has all three language heads, BERT the first two of the last
HEADS = {
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "image": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),
}

# settings that every configuration takes although they are none of its fields
EXTRA_SETTINGS = {
    "num_labels": "int",
    "attn_implementation": "str",
    "experts_implementation": "str",
}

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
}


def load_target(
    target: str,
    *,
    overrides: Mapping[str, str],
    batch_size: int,
    seq_len: int,
    dtype: str | None,
    seed: int = 0,
) -> tuple[nn.Module, Any]:
    """The model in train mode, and a batch whose output has a loss.

    Args:
        target: ``module:function``, where the function takes nothing and returns
            ``(model, batch)``, imported with the current directory on the path; or a Hugging Face
            model type such as ``gpt2``, built from its default configuration with random weights.
        overrides: configuration fields and their values as text; Hugging Face types only, as are
            ``batch_size``, ``seq_len`` and ``dtype``.
        seq_len: tokens per sequence (source and target each, in an encoder-decoder model).
        dtype: of weights and images, such as ``bf16``; None keeps the configuration's.
        seed: of weights and batch; the global random state is left as it was.

    Raises:
        TargetError: the target does not exist or does not return what it must, a setting is unknown
            or of the wrong type, or transformers is not installed.
    """
    if batch_size < 1 or seq_len < 1:
        raise TargetError(
            f"batch size and sequence length must be at least 1; found {batch_size} and {seq_len}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if ":" in target:
            if overrides or dtype is not None:
                given = [*overrides, *(["dtype"] if dtype is not None else [])]
                raise TargetError(
                    f"{', '.join(given)}: settings apply to Hugging Face model types only; "
                    f"{target} sets up its own model"
                )
            return _from_function(target)
        return _from_transformers(target, overrides, batch_size, seq_len, dtype)


# module:function


def _from_function(target: str) -> tuple[nn.Module, Any]:
    module_name, _, function_name = target.partition(":")
    if not module_name or not function_name:
        raise TargetError(f"{target!r} is not of the form module:function")
    with _current_directory_on_path():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module exists, and imports something that does not
            raise TargetError(
                f"no module {module_name!r} in {os.getcwd()} or on the Python path"
            ) from error
        function = getattr(module, function_name, None)
        if not callable(function):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise TargetError(
                f"{module_name} has no function {function_name!r}{_close(function_name, names)}"
            )
        result = function()
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        found = (
            f"a tuple of {', '.join(type(item).__name__ for item in result)}"
            if isinstance(result, tuple)
            else type(result).__name__
        )
        raise TargetError(f"{target} must return (model, batch), the model first; found {found}")
    return result


@contextmanager
def _current_directory_on_path() -> Iterator[None]:
    directory = os.getcwd()
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)


# Hugging Face


def _from_transformers(
    model_type: str, overrides: Mapping[str, str], batch_size: int, seq_len: int, dtype: str | None
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    try:
        import transformers
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise TargetError(
            f"{model_type!r} is a Hugging Face model type, and transformers cannot be imported "
            f"({error}): pip install transformers; your own model is named module:function"
        ) from error

    types = {head: getattr(modeling_auto, names) for head, (names, _) in HEADS.items()}
    head = next((h for h in HEADS if model_type in types[h]), None)
    if head is None or model_type not in transformers.CONFIG_MAPPING:
        known = sorted({name for mapping in types.values() for name in mapping})
        why = (
            "has none of the heads that a random batch can train (language models and image "
            "classification)"
            if model_type in transformers.CONFIG_MAPPING
            else "is neither module:function nor a Hugging Face model type"
        )
        raise TargetError(f"{model_type!r} {why}{_close(model_type, known)}")
    if dtype is not None and dtype not in DTYPES:
        raise TargetError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")

    config = _configure(transformers.CONFIG_MAPPING[model_type], model_type, overrides)
    if head == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if head != "image" and isinstance(longest, int) and 0 < longest < seq_len:
        raise TargetError(
            f"{model_type} has {longest} positions, and the sequence length is {seq_len}: "
            f"--seq-len {longest}, or --set max_position_embeddings={seq_len}"
        )
    auto = getattr(transformers, HEADS[head][1])
    try:
        model: nn.Module = auto.from_config(
            config, **({} if dtype is None else {"dtype": DTYPES[dtype]})
        )
    except (ValueError, TypeError) as error:
        raise TargetError(f"{model_type} cannot be built as configured: {error}") from error
    model.train()

    if head == "image":
        weights = next(p.dtype for p in model.parameters() if p.is_floating_point())
        batch = _images(config, batch_size, weights)
    else:
        batch = _tokens(head, int(text.vocab_size), batch_size, seq_len)
    return model, batch


def _tokens(head: str, vocab: int, batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
    """Random ids with labels: the same ids, other ids (seq2seq), or 15 % of the ids (masked)."""
    first = min(4, vocab - 1)  # padding and the like come first in most vocabularies
    ids = torch.randint(first, vocab, (batch_size, seq_len))
    labels = (
        torch.randint(first, vocab, (batch_size, seq_len)) if head == "seq2seq" else ids.clone()
    )
    if head == "masked":
        hidden = torch.rand(ids.shape) >= 0.15
        hidden[:, 0] = False
        labels = labels.masked_fill(hidden, -100)
    return {"input_ids": ids, "labels": labels}


def _images(config: Any, batch_size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", None) or 3
    return {
        "pixel_values": torch.randn(batch_size, channels, height, width, dtype=dtype),
        "labels": torch.randint(config.num_labels, (batch_size,)),
    }


def _configure(config_class: type[Any], model_type: str, overrides: Mapping[str, str]) -> Any:
    """The default configuration with the overrides, each parsed to the type of its field."""
    default = config_class()
    annotations = (
        {f.name: f.type for f in dataclasses.fields(default)}
        if dataclasses.is_dataclass(default)
        else {}
    )
    aliases: Mapping[str, str] = getattr(config_class, "attribute_map", {})
    names = {*annotations, *default.to_dict(), *aliases, *EXTRA_SETTINGS}
    values: dict[str, Any] = {}
    for name, text in overrides.items():
        if name not in names:
            raise TargetError(f"{model_type} has no setting {name!r}{_close(name, names)}")
        field = aliases.get(name, name)
        fallback = EXTRA_SETTINGS.get(field, type(getattr(default, field, "")).__name__)
        values[field] = _parse(name, text, _kinds(annotations.get(field, fallback)))
    try:
        return config_class(**values)
    except (ValueError, TypeError) as error:
        raise TargetError(f"{model_type} refuses its settings: {error}") from error


def _kinds(annotation: Any) -> set[str]:
    """The names of the types that a field takes: ``int | None`` gives int and None."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"Literal\[[^\]]*\]", "str", text)
    return set(re.findall(r"\w+", re.sub(r"\[[^\]]*\]", "", text)))


def _parse(name: str, text: str, kinds: set[str]) -> Any:
    """The value that a setting's text stands for, by the first type of its field that fits."""
    if {"None", "NoneType"} & kinds and text.lower() in ("none", "null"):
        return None
    if "bool" in kinds and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    if "int" in kinds and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if "float" in kinds:
        try:
            return float(text)
        except ValueError:
            pass
    if {"list", "tuple"} & kinds and re.fullmatch(r"\[.*\]|[^{]*,.*", text):
        try:
            return json.loads(text if text.startswith("[") else f"[{text}]")
        except json.JSONDecodeError:
            pass
    if "dict" in kinds and text.startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            pass
    if "str" in kinds:
        return text
    wanted = " or ".join(sorted(kinds - {"NoneType"}))
    raise TargetError(f"{name}={text!r}: the value must be {wanted}")


def _close(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name."""
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
