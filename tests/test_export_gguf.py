"""GGUF files: read back bit for bit, run by llama.cpp, and what has no place in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import actckpt
from actckpt.errors import ArgumentError, WeightsExportError
from actckpt.exporting import gguf_vocabulary
from actckpt.exporting.drift import check_drift
from actckpt.exporting.gguf_file import NAME, turned_back
from actckpt.exporting.gguf_layout import check_limits, layout_of
from actckpt.exporting.source import source_of_module
from actckpt.exporting.weights import same_bits
from tests.travelling import TRAVELLERS, VOCABULARY, Traveller, gpt2, llama

pytest.importorskip("gguf", reason="pip install 'actckpt[gguf]'")
WHY = "llama.cpp runs the files: pip install 'actckpt[llama-cpp]'"
TEXT = TRAVELLERS["llama"].inputs
# llama.cpp computes GELU by a table of float16, products of rounded weights with rounded rows
TOLERANCES = {"F32": 1e-3, "F16": 1e-2, "BF16": 0.05, "Q8_0": 0.15, "Q4_0": 0.3}
ROPE = {"rope_theta": 100.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    own = llama().config.to_dict()
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
             "num_key_value_heads", "vocab_size", "max_position_embeddings")  # fmt: skip
    return MistralForCausalLM(MistralConfig(sliding_window=None, **{n: own[n] for n in names}))


def sibling(config: str, **more: Any) -> Any:
    """A model of another family, of Llama's sizes here."""
    import transformers

    own = llama().config.to_dict()
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
             "num_key_value_heads", "vocab_size", "max_position_embeddings")  # fmt: skip
    made = getattr(transformers, config)(**{n: own[n] for n in names}, pad_token_id=0, **more)
    return transformers.AutoModelForCausalLM.from_config(made)


KINDS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "qwen2": lambda: sibling("Qwen2Config"),
    "qwen2 tied, yarn": lambda: sibling(
        "Qwen2Config",
        tie_word_embeddings=True,
        rope_parameters={**ROPE, "rope_type": "yarn", "factor": 4.0},
    ),
    "qwen3": lambda: sibling("Qwen3Config", head_dim=16),
    "phi3": lambda: sibling("Phi3Config"),
    "phi3 of heads turned in part": lambda: sibling(
        "Phi3Config", rope_parameters={"rope_theta": 100.0, "partial_rotary_factor": 0.5}
    ),
    "llama of other heads": lambda: llama(head_dim=16),
    "llama with biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama linear": lambda: llama(
        rope_parameters={"rope_theta": 100.0, "rope_type": "linear", "factor": 4.0}
    ),
    "llama llama3": lambda: llama(rope_parameters={**ROPE, **LLAMA3}),
    "llama yarn": lambda: llama(rope_parameters={**ROPE, "rope_type": "yarn", "factor": 4.0}),
}


def made(kind: str) -> Any:
    return Traveller(KINDS[kind], TEXT)()


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(kind: str) -> None:
    pytest.importorskip("cyllama", reason=WHY)
    tolerance = TOLERANCES["F32"] if kind == "gpt2" else 3e-5
    found = check_drift(made(kind), "gguf", TEXT, tolerance=tolerance)
    assert len(found.deviations) == 2


@pytest.mark.parametrize("quantization", TOLERANCES)
def test_quantized_files_are_run(quantization: str) -> None:
    pytest.importorskip("cyllama", reason=WHY)
    tolerance = TOLERANCES[quantization]
    check_drift(made("llama"), "gguf", TEXT, tolerance=tolerance, quantization=quantization)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_turn_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    import gguf

    model = made("llama with biases").to(dtype)
    done = actckpt.export(model, tmp_path / "out", format="gguf")
    source = source_of_module(model, "llama")
    back = turned_back(str(done.path / NAME), layout_of(source))
    for name, weight in model.state_dict().items():
        assert same_bits(back[name].to(dtype), weight)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(done.path / NAME).tensors}
    matrices = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert kinds["blk.0.attn_q.weight"] == matrices
    assert kinds["blk.0.attn_q.bias"] == kinds["output_norm.weight"] == "F32"
    assert not [note for note in done.notes if "rounded" in note]


def test_a_tied_model_has_one_matrix_and_an_untied_one_two(tmp_path: Path) -> None:
    import gguf

    for tied in (True, False):
        done = actckpt.export(llama(tie_word_embeddings=tied), tmp_path / str(tied), format="gguf")
        names = {t.name for t in gguf.GGUFReader(done.path / NAME).tensors}
        assert ("output.weight" in names) != tied


def test_what_has_no_place_is_refused_by_name(tmp_path: Path) -> None:
    dynamic = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}}
    attention = {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "mscale": 2.0}}
    strange = llama()
    strange.register_buffer("mine", torch.zeros(1))
    large = llama()
    large.lm_head.weight.data[0, 0] = 1e5
    narrow = llama(intermediate_size=48)
    partly = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    scaled = {"rope_parameters": {**ROPE, **LLAMA3}}
    cases: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (TRAVELLERS["bert"](), {}, "BertForMaskedLM .bert. has no layout for GGUF"),
        (TRAVELLERS["own"](), {}, "Own .* has no layout"),
        (llama(**dynamic), {}, "rope_type 'dynamic' has no place"),
        (llama(**attention), {}, "mscale of rope_type 'yarn' has no place"),
        (llama(hidden_act="gelu"), {}, "hidden_act = 'gelu' of LlamaForCausalLM has no place"),
        (gpt2(scale_attn_by_inverse_layer_idx=True), {}, "scale_attn_by_inverse_layer_idx = True"),
        (strange, {}, "mine .1 in all. has no place"),
        (large, {"quantization": "F16"}, "an element of 100000, which float16 cannot hold"),
        (narrow, {"quantization": "Q8_0"}, "rows of 48 elements, and Q8_0 takes 32 at a time"),
        (sibling("Qwen2Config", **partly), {}, "partial_rotary_factor of rope_type 'default'"),
        (sibling("Qwen3Config", **scaled), {}, "rope_type 'llama3' of Qwen3ForCausalLM has no"),
        (sibling("Qwen3Config", attention_bias=True), {}, "attention_bias = True of Qwen3For"),
        (sibling("GemmaConfig"), {}, "GemmaForCausalLM .gemma. has no layout for GGUF"),
        (llama().double(), {}, "is float64; GGUF files are written of"),
    )
    for model, more, message in cases:
        with pytest.raises(WeightsExportError, match=message):
            actckpt.export(model, tmp_path / "out", format="gguf", **more)
    with pytest.raises(ArgumentError, match="quantization must be one of F32, F16, BF16"):
        actckpt.export(llama(), tmp_path / "out", format="gguf", quantization="Q3")
    assert os.listdir(tmp_path) == []


def test_ggmls_limits() -> None:
    check_limits("x" * 63, (1, 2, 3, 4))
    for name, shape in (("x" * 64, (1,)), ("é" * 32, (1,)), ("x", (1, 1, 1, 1, 1))):
        with pytest.raises(WeightsExportError, match="beyond ggml's limits"):
            check_limits(name, shape)


def test_the_writer_itself_checks_no_limits(tmp_path: Path) -> None:
    """The trap: once this fails, the library has been mended."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x" * 64, np.zeros((1, 1, 1, 1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "x.gguf").stat().st_size > 64


def _bytes_tokenizer(llama3: bool = False, normalizer: Any = None) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE(ignore_merges=llama3))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama3)
    split = pre_tokenizers.Split(Regex(gguf_vocabulary._LLAMA3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level] if llama3 else [level])
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAID * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def _llama3_tokenizer() -> Any:
    return _bytes_tokenizer(llama3=True)


def _metaspace_tokenizer() -> Any:
    return _fallback_tokenizer(metaspace=True)


def _fallback_tokenizer(metaspace: bool = False) -> Any:
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{n:02X}>": n + 3 for n in range(256)}
    merges = []
    for left, right in (("t", "h"), ("th", "e"), ("\u2581", "the"), ("s", "e"), ("a", "t")):
        for part in (left, right, left + right):
            vocabulary.setdefault(part, len(vocabulary))
        merges.append((left, right))
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


SAID = "the sea that the 42 seas hid, isn't the sea: caf\u00e9  the\n end"


@pytest.mark.parametrize(
    "make", [_bytes_tokenizer, _llama3_tokenizer, _fallback_tokenizer, _metaspace_tokenizer]
)
def test_llama_cpp_makes_the_same_tokens_of_text(make: Callable[[], Any], tmp_path: Path) -> None:
    pytest.importorskip("cyllama", reason=WHY)
    import cyllama.llama.llama_cpp as cpp

    cpp.disable_logging()
    tokenizer = make()
    model = llama(vocab_size=320)
    done = actckpt.export(model, tmp_path / "out", format="gguf", tokenizer=tokenizer)
    read = cpp.LlamaModel(str(done.path / NAME), cpp.LlamaModelParams())
    vocabulary = read.get_vocab()
    found = vocabulary.tokenize(SAID, False, False)
    assert list(found) == tokenizer(SAID)["input_ids"]
    assert vocabulary.token_eos() == tokenizer.eos_token_id


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import NFC
    from transformers import PreTrainedTokenizerFast

    large = llama(vocab_size=320)
    words = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    for model, tokenizer, message in (
        (large, PreTrainedTokenizerFast(tokenizer_object=words), "a tokenizer of WordLevel"),
        (large, _bytes_tokenizer(normalizer=NFC()), "BPE after NFC, ByteLevel has no name"),
        (llama(), _bytes_tokenizer(), rf"has \d+ tokens, the model {VOCABULARY}"),
    ):
        with pytest.raises(WeightsExportError, match=message):
            actckpt.export(model, tmp_path / "out", format="gguf", tokenizer=tokenizer)
    assert os.listdir(tmp_path) == []


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library, extra in (("cyllama.llama.llama_cpp", "llama-cpp"), ("gguf", "gguf")):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, library, None)
            with pytest.raises(WeightsExportError, match=rf"pip install 'actckpt\[{extra}\]'"):
                check_drift(llama(), "gguf", TEXT, tolerance=1)
