"""Weights in a few bits leave dense, or not at all; adapters of them leave alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import actckpt
from actckpt.errors import ArgumentError, WeightsExportError
from actckpt.exporting.weights import same_bits
from tests.test_quantized import adapted, four_bits

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def four() -> tuple[nn.Module, torch.Tensor]:
    """A layer of 4 bits, and what its weight stands for."""
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    weight = layer.weight
    return nn.Sequential(layer), bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def eight() -> tuple[nn.Module, torch.Tensor]:
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    return nn.Sequential(layer), layer.weight.data.float() * (layer.weight.SCB / 127)[:, None]


def torchao() -> tuple[nn.Module, torch.Tensor]:
    quantization: Any = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    weight: Any = model[0].weight
    return model, weight.dequantize()


@pytest.mark.parametrize("make", [four, eight, torchao])
def test_they_are_refused_or_made_dense(make: Any, tmp_path: Path) -> None:
    model, dense = make()
    with actckpt.Checkpointer(tmp_path / "run", model=model, every=1) as run:
        run.step({})
    for number, source in enumerate((model, tmp_path / "run")):
        with pytest.raises(WeightsExportError, match=r"has 0\.weight quantized .*dequantize=True"):
            actckpt.export(source, tmp_path / "out")
        out = tmp_path / str(number)
        actckpt.export(source, out, dequantize=True)
        found = load_file(out / "model.safetensors")
        assert set(found) == {"0.weight", "0.bias"}
        assert same_bits(found["0.weight"], dense)
    with pytest.raises(ArgumentError, match="dequantize is no argument of format 'huggingface'"):
        actckpt.export(model, tmp_path / "out", format="huggingface", dequantize=True)
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "run"]


def test_an_adapter_leaves_without_its_base(tmp_path: Path) -> None:
    model: Any = adapted(four_bits())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    done = actckpt.export(model, tmp_path / "out", format="adapter")
    found = load_file(done.path / "adapter_model.safetensors")
    assert len(found) == len(trained)
    assert all(same_bits(found[n.replace(".default", "")], p) for n, p in trained.items())
    assert done.notes == ("the base is in a few bits: the adapter was read back without it",)
