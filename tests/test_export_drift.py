"""The check of every conversion, and the faults that it must find."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actckpt
from actckpt.errors import ArgumentError, WeightsExportError
from actckpt.exporting import gguf_file, gguf_layout, gguf_values
from actckpt.exporting.drift import check_drift
from actckpt.exporting.gguf_layout import AS_IT_IS, TRANSPOSED, Laid, Layout
from tests.travelling import TRAVELLERS, Traveller, llama

TEXT = TRAVELLERS["llama"].inputs
TOLERANCE = 3e-5
BITWISE = ("safetensors", "pt", "huggingface")


@pytest.mark.parametrize("format", BITWISE)
@pytest.mark.parametrize("name", [name for name in TRAVELLERS if name != "lora"])
def test_the_same_bits(name: str, format: str) -> None:
    traveller = TRAVELLERS[name]
    found = check_drift(traveller(), format, traveller.inputs, tolerance=0)
    assert found.deviations == (0, 0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("format", ["safetensors", "pt", "adapter"])
def test_the_same_bits_of_an_adapted_model(format: str) -> None:
    traveller = TRAVELLERS["lora"]
    check_drift(traveller(), format, traveller.inputs, tolerance=0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("format", ["huggingface", "gguf"])
def test_a_merged_model_computes_nearly_the_same(format: str) -> None:
    pytest.importorskip("cyllama")
    traveller = TRAVELLERS["lora"]
    check_drift(traveller(), format, traveller.inputs, tolerance=TOLERANCE)


def test_two_shapes_are_asked_for() -> None:
    with pytest.raises(ArgumentError, match="two shapes"):
        check_drift(llama(), "pt", [TEXT[0], TEXT[0]], tolerance=0)


# Faults: each as consistent as a mistake of the author's would be, so that what was written reads
# back as it was meant


def tensors(change: Callable[[Laid], Laid | None]) -> Callable[[Layout], Layout]:
    def changed(layout: Layout) -> Layout:
        found = (change(laid) for laid in layout.tensors)
        return dataclasses.replace(layout, tensors=tuple(x for x in found if x is not None))

    return changed


def turned(ending: str, turn: Any) -> Callable[[Layout], Layout]:
    return tensors(
        lambda laid: dataclasses.replace(laid, turn=turn) if laid.name.endswith(ending) else laid
    )


def metadata(key: str, value: Any) -> Callable[[Layout], Layout]:
    def changed(layout: Layout) -> Layout:
        left = {k: v for k, v in layout.metadata.items() if not k.startswith(key)}
        more = {} if value is None else {key: value}
        return dataclasses.replace(layout, metadata={**left, **more})

    return changed


def swapped(laid: Laid) -> Laid:
    other = {"blk.0.ffn_gate.weight": "up_proj", "blk.0.ffn_up.weight": "gate_proj"}
    if laid.name not in other:
        return laid
    return dataclasses.replace(laid, weight=f"model.layers.0.mlp.{other[laid.name]}.weight")


LINEAR = {"rope_parameters": {"rope_theta": 100.0, "rope_type": "linear", "factor": 4.0}}
FAULTS: dict[str, tuple[dict[str, Any], Callable[[Layout], Layout]]] = {
    "no permutation": ({}, turned("attn_q.weight", AS_IT_IS)),
    "biases not permuted": ({"attention_bias": True}, turned("attn_k.bias", AS_IT_IS)),
    "scaling not written": (LINEAR, metadata("rope.scaling", None)),
    "a transposed matrix": ({}, turned("0.attn_output.weight", TRANSPOSED)),
    "epsilon 1e-3 for 1e-5": (
        {"rms_norm_eps": 1e-5}, metadata("attention.layer_norm_rms_epsilon", 1e-3),
    ),
    "untied weights tied": ({}, tensors(lambda x: None if x.name == "output.weight" else x)),
    "two tensors swapped": ({}, tensors(swapped)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cyllama", reason="llama.cpp shows what the file is taken for")
    settings, change = FAULTS[fault]
    model = Traveller(lambda: llama(**settings), TEXT)()
    check_drift(model, "gguf", TEXT, tolerance=TOLERANCE)
    lay = gguf_layout.layout_of
    monkeypatch.setattr(gguf_file, "layout_of", lambda source: change(lay(source)))
    with pytest.raises(WeightsExportError, match="outputs deviate by"):
        check_drift(model, "gguf", TEXT, tolerance=TOLERANCE)


def test_without_scaling_up_a_missing_permutation_is_hardly_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Why weights are scaled: untrained ones deviate less than what a quantized file may."""
    pytest.importorskip("cyllama")
    model = llama()
    monkeypatch.setattr(gguf_layout, "rotary", lambda heads: AS_IT_IS)
    found = check_drift(model, "gguf", TEXT, tolerance=0.15, factor=1.0)
    assert max(found.deviations) < 0.05
    with pytest.raises(WeightsExportError, match="outputs deviate by"):
        check_drift(Traveller(llama, TEXT)(), "gguf", TEXT, tolerance=0.15)


def test_a_block_that_is_quantized_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    write = gguf.GGUFWriter.write_tensor_data
    kinds = gguf.GGMLQuantizationType
    done: list[bool] = []

    def twice(self: Any, data: np.ndarray[Any, Any], *more: Any) -> None:
        if data.dtype == np.uint8 and not done:
            data = data.copy()
            block = gguf.dequantize(data[0, :34], kinds.Q8_0)
            again = gguf.dequantize(gguf.quantize(block, kinds.Q4_0), kinds.Q4_0)
            data[0, :34] = gguf.quantize(again, kinds.Q8_0)
            done.append(True)
        write(self, data, *more)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", twice)
    with pytest.raises(WeightsExportError, match="did not read back bit for bit"):
        check_drift(llama(), "gguf", TEXT, tolerance=1, quantization="Q8_0")
    assert done


def halved(encode: Any, x: torch.Tensor, kind: str) -> Any:
    return encode(x / 2, kind)


def flipped(encode: Any, x: torch.Tensor, kind: str) -> Any:
    return encode(x.flip(0) * 3, kind)


def twice_rounded(encode: Any, x: torch.Tensor, kind: str) -> Any:
    coarse = {"Q8_0": "Q4_0", "F16": "BF16", "BF16": "Q8_0", "Q4_0": "Q4_0"}[kind]
    rough = gguf_values.decoded(encode(x, coarse), coarse, tuple(x.shape)).float()
    return encode(rough * (1.2 if kind == coarse else 1), kind)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("fault", [halved, flipped, twice_rounded])
def test_a_fault_of_the_encoder_is_found(
    fault: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads back as it was written, and a model of what was read computes the same."""
    pytest.importorskip("gguf")
    model: Any = Traveller(llama, TEXT)()
    wrong = model.model.layers[1].mlp.up_proj.weight.detach()
    encode = gguf_values.encoded

    def planted(x: torch.Tensor, kind: str) -> Any:
        return fault(encode, x, kind) if torch.equal(x, wrong) else encode(x, kind)

    actckpt.export(model, tmp_path / "sound", format="gguf", quantization=kind)
    monkeypatch.setattr(gguf_file, "encoded", planted)
    with pytest.raises(WeightsExportError, match=r"up_proj\.weight is farther from the model's"):
        actckpt.export(model, tmp_path / "out", format="gguf", quantization=kind)
    assert [x.name for x in tmp_path.iterdir()] == ["sound"]


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 1e4])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_rounding_once_is_within_its_bound(kind: str, scale: float) -> None:
    """Subnormal scales, and an opposite of the largest, which Q4_0 has no number for."""
    pytest.importorskip("gguf")
    made = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=made) * scale
    x[:, 0] = x[:, 1] = 0
    x[:, 0], x[:, 1] = x.abs().amax(1), -x.abs().amax(1)
    found = gguf_values.decoded(gguf_values.encoded(x, kind), kind, (64, 64))
    assert gguf_values.is_rounded_once(found, x, kind)
    assert not gguf_values.is_rounded_once(found + x.abs().max() / 4 + 2.0**-17, x, kind)


def test_a_tied_weight_that_comes_untied_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The consumer's model has an output matrix of its own, which the file does not fill."""
    traveller = TRAVELLERS["gpt2"]
    model: Any = traveller()
    kind = type(model)
    save = kind.save_pretrained

    def untied(self: Any, *args: Any, **more: Any) -> None:
        self.config.tie_word_embeddings = False
        save(self, *args, **more)

    monkeypatch.setattr(kind, "save_pretrained", untied)
    with pytest.raises(WeightsExportError, match=r"lm_head|other values"):
        check_drift(model, "huggingface", traveller.inputs, tolerance=0)
