"""``actckpt checkpoint export --format`` and ``convert``: sizes first, then the folder."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import actckpt
from actckpt.cli import main
from actckpt.exporting.weights import same_bits
from tests.travelling import TRAVELLERS, Own, llama

Capture = pytest.CaptureFixture[str]


def own() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A target."""
    return Own(), dict(TRAVELLERS["own"].inputs[0])


def command(*argv: object) -> int:
    return main(["checkpoint", *map(str, argv)])


def run_of(directory: Path, model: nn.Module) -> Path:
    with actckpt.Checkpointer(directory, model=model, every=1) as run:
        run.step({})
    return directory


def test_sizes_are_said_before_anything_is_written(tmp_path: Path, capsys: Capture) -> None:
    run = run_of(tmp_path / "run", TRAVELLERS["own"]())
    target = ("--model", "tests.test_export_command:own", "--format", "huggingface")
    assert command("export", run, tmp_path / "out", *target, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "of weights to" in said
    assert "nothing was written" in said
    assert os.listdir(tmp_path) == ["run"]
    assert command("export", run, tmp_path / "out", *target, "--max-shard-gb", "1e-6") == 0
    said, err = capsys.readouterr()
    assert err == ""
    assert "model.safetensors.index.json  " in said
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]
    assert command("verify", tmp_path / "out") == 0
    assert "bytes, sound" in capsys.readouterr().out
    (tmp_path / "out" / "config.json").write_text("{}")
    assert command("verify", tmp_path / "out") == 1
    assert "config.json is truncated" in capsys.readouterr().out


def test_a_folder_gives_the_architecture_and_is_converted(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("gguf")
    model: Any = llama()
    run = run_of(tmp_path / "run", model)
    actckpt.export(model, tmp_path / "folder", format="huggingface")
    folder = tmp_path / "folder"
    to = ("--format", "gguf", "--quantization", "Q8_0")
    assert command("export", run, tmp_path / "one", "--model", folder, *to) == 0
    assert command("convert", folder, tmp_path / "two", *to) == 0
    one, two = (tmp_path / name / "model.gguf" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert "tensors are rounded to Q8_0" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["lacks", "has besides", "has in another shape"])
def test_a_folder_of_other_weights_is_not_converted(
    fault: str, tmp_path: Path, capsys: Capture
) -> None:
    """from_pretrained makes up what it does not find."""
    model: Any = llama()
    model.save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "lacks":
        del state[name]
    elif fault == "has besides":
        name = "model.layers.1.mlp.more.weight"
        state[name] = torch.zeros(2)
    else:
        state[name] = torch.zeros(3, 3)
    save_file(state, file, metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers tells it in its own way, too
        assert command("convert", tmp_path / "folder", tmp_path / "out", "--format", "pt") == 2
    err = capsys.readouterr().err
    assert f"folder {fault} {name}" in err or f"folder {fault} ('{name}'" in err
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_of_several_dtypes_keeps_them(tmp_path: Path) -> None:
    model: Any = llama().bfloat16()
    model.model.norm.float()
    model.model.norm.weight.data.add_(1e-4)
    model.save_pretrained(tmp_path / "folder")
    wanted = load_file(tmp_path / "folder" / "model.safetensors")
    assert len({x.dtype for x in wanted.values()}) == 2
    assert command("convert", tmp_path / "folder", tmp_path / "out", "--format", "safetensors") == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[name], wanted[name]) for name in wanted)


def test_what_stands_in_the_way_is_one_clear_error(tmp_path: Path, capsys: Capture) -> None:
    run = run_of(tmp_path / "run", TRAVELLERS["own"]())
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    for folder in (empty, damaged):
        model: Any = llama()
        model.save_pretrained(folder)
    (empty / "model.safetensors").unlink()
    (damaged / "model.safetensors").write_bytes(b"{")
    capsys.readouterr()  # transformers' bars
    cases = (
        (("export", run, tmp_path / "out", "--format", "huggingface"), "pass the model"),
        (("export", run, run, "--format", "pt"), "exists: delete it"),
        (
            ("export", run, tmp_path / "out", "--format", "pt", "--quantization", "F16"),
            "no argument",
        ),
        (("convert", run, tmp_path / "out", "--format", "pt"), "has no config.json"),
        (("convert", empty, tmp_path / "out", "--format", "pt"), "no weights beside it"),
        (("convert", damaged, tmp_path / "out", "--format", "pt"), "model.safetensors"),
    )
    for argv, message in cases:
        assert command(*argv) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["damaged", "empty", "run"]
