"""``actckpt checkpoint import``: what others wrote, as safetensors, before and without a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actckpt.cli import main
from tests.written_by_deepspeed.make import Net

WRITTEN = Path(__file__).parent / "written_by_deepspeed"
Capture = pytest.CaptureFixture[str]


def command(*argv: object) -> int:
    return main(["checkpoint", "import", *map(str, argv)])


def test_deepspeed_as_it_is_and_in_16_bits(tmp_path: Path, capsys: Capture) -> None:
    wanted = load_file(WRITTEN / "zero3.expected.safetensors")
    assert command(WRITTEN / "zero3", tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "a ZeRO checkpoint of DeepSpeed): 7 tensors" in said
    assert said.endswith("nothing was written\n")
    assert list(tmp_path.iterdir()) == []
    assert command(WRITTEN / "zero3", tmp_path / "out") == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == Net().state_dict().keys()
    assert all(
        torch.equal(found[name.removeprefix("fp32/")], x)
        for name, x in wanted.items()
        if name.startswith("fp32/")
    )
    assert command(WRITTEN / "zero3", tmp_path / "half", "--dtype", "bfloat16") == 0
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {x.dtype for x in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[name], x.bfloat16()) for name, x in found.items())
    assert main(["checkpoint", "verify", str(tmp_path / "half")]) == 0


def test_what_cannot_be_imported_leaves_nothing(tmp_path: Path, capsys: Capture) -> None:
    large = tmp_path / "large.pt"
    torch.save({"weight": torch.tensor([1e38])}, large)
    part = tmp_path / "part.pt"
    eighth = torch.ones(2, 2).to(torch.float8_e4m3fn)
    torch.save({"weight": eighth, "weight_scale_inv": torch.ones(1, 1)}, part)
    cases = {
        (str(tmp_path / "none"), "out"): "does not exist",
        (str(large), "out", "--dtype", "float16"): "choose a wider dtype",
        (str(part), "out", "--dtype", "bfloat16"): "multiplied by weight_scale_inv",
        (str(large), "out", "--item", "ema"): "no part 'ema'",
        (str(large), "large.pt"): "exists: delete it",
    }
    for (source, out, *options), told in cases.items():
        assert command(source, tmp_path / out, *options) == 2
        assert told in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == [large, part]


def test_what_is_no_tensor_is_named(tmp_path: Path, capsys: Capture) -> None:
    torch.save({"weight": torch.ones(2), "a._extra_state": {"count": 3}}, tmp_path / "x.pt")
    assert command(tmp_path / "x.pt", tmp_path / "out") == 0
    assert "left out, no tensors: a._extra_state" in capsys.readouterr().out
