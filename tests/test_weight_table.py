"""The table of weights that every export reads, and the safetensors form of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import actckpt
from actckpt.checkpoint.files import Files
from actckpt.errors import ArgumentError, CheckpointError, WeightsExportError
from actckpt.exporting.folder import verify_folder
from actckpt.exporting.source import source_of
from actckpt.exporting.weights import make_table, same_bits
from tests.travelling import TRAVELLERS, Own


def table(source: Any, **more: Any) -> Any:
    return source_of(Files(), source, item=more.pop("item", "model"), model=more.pop("model", None))


def run_of(directory: Path, model: nn.Module, **more: Any) -> Path:
    with actckpt.Checkpointer(directory, model=model, every=1, **more) as run:
        run.step({"loss": 0.5})
    return directory


def expected(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def same_all(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(same_bits(found[k], wanted[k]) for k in wanted)


def test_roles_and_ties_of_a_model_and_of_its_checkpoint(tmp_path: Path) -> None:
    model = TRAVELLERS["own"]()
    run = run_of(tmp_path / "run", model)
    for found in (table(model), table(run, model=Own())):
        roles = {name: weight.role for name, weight in found.table.weights.items()}
        assert roles["embed.weight"] == roles["head.weight"] == "parameter"
        assert roles["norm.running_mean"] == roles["scale"] == "buffer"
        assert roles["shift"] == "non-persistent"
        assert found.table.tied == (("embed.weight", "head.weight"),)
        assert same_all(found.table.persistent(), expected(model))
    alone = table(run).table
    assert {w.role for w in alone.weights.values()} == {"saved", "non-persistent"}
    assert alone.facts["step"] == 1
    assert alone.facts["metrics"] == {"loss": 0.5}


def test_views_are_told_from_ties() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"whole": whole, "again": whole, "rows": whole[1:], "apart": whole.clone()}
    state |= {"left": whole.new_zeros(4)[:2]}
    found = make_table(state, {}, "here")
    assert found.tied == (("whole", "again"),)
    assert found.views == (("again", "rows", "whole"),)
    rows, whole_again = (found.weights[n].tensor for n in ("rows", "again"))
    assert same_bits(rows, whole[1:])
    assert rows.untyped_storage().data_ptr() != whole_again.untyped_storage().data_ptr()
    assert whole_again.data_ptr() == found.weights["whole"].tensor.data_ptr()
    fused = torch.zeros(4)
    parts = make_table({"a": fused[:2], "b": fused[2:]}, {}, "here")
    assert (parts.tied, parts.views) == ((), ())


def test_conjugates_and_negatives_are_written_as_what_they_are(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    model: Any = nn.Module()
    model.register_buffer("conjugate", z.conj())
    model.register_buffer("negative", z.conj().imag)
    assert model.conjugate.is_conj()
    assert model.negative.is_neg()
    actckpt.export(model, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["conjugate"], torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(found["negative"], torch.tensor([-2.0, 4.0]))


def test_the_librarys_own_writer_gets_conjugates_wrong(tmp_path: Path) -> None:
    """The trap: once this fails, the library has been mended."""
    z = torch.tensor([1 + 2j], dtype=torch.complex64)
    save_file({"x": z.conj()}, tmp_path / "x")
    assert not torch.equal(load_file(tmp_path / "x")["x"], z.conj())


def test_wrappers_leave_no_names(tmp_path: Path) -> None:
    model = TRAVELLERS["own"]()
    wanted = expected(model)
    compiled: Any = torch.compile(TRAVELLERS["own"](), backend="eager")
    inside: Any = TRAVELLERS["own"]()
    inside.norm = torch.compile(inside.norm, backend="eager")
    averaged = AveragedModel(model)
    for wrapped in (nn.DataParallel(model), compiled, inside, averaged):
        assert same_all(table(wrapped).table.persistent(), wanted)
    run = run_of(tmp_path / "run", compiled, ema=averaged)
    for item in ("model", "ema"):
        assert same_all(table(run, item=item, model=Own()).table.persistent(), wanted)
    own = nn.ModuleDict({"module": nn.Linear(1, 1), "other": nn.Linear(1, 1)})
    assert "module.weight" in table(own).table.weights


def test_the_average_can_be_chosen(tmp_path: Path) -> None:
    model: Any = TRAVELLERS["own"]()
    averaged = AveragedModel(model)
    for _ in range(2):
        with torch.no_grad():
            model.embed.weight.add_(1)
        averaged.update_parameters(model)
    run = run_of(tmp_path / "run", model, ema=averaged)
    actckpt.export(run, tmp_path / "ema", item="ema")
    found = load_file(tmp_path / "ema" / "model.safetensors")
    assert same_all(found, expected(averaged.module))
    assert not same_bits(found["embed.weight"], model.embed.weight)


def test_the_folder_is_whole_and_checked(tmp_path: Path) -> None:
    model = TRAVELLERS["own"]()
    done = actckpt.export(model, tmp_path / "out")
    assert same_all(load_file(tmp_path / "out" / "model.safetensors"), expected(model))
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert done.files == {"model.safetensors": (done.path / "model.safetensors").stat().st_size}
    said = verify_folder(Files(), str(done.path))
    assert said["tied"] == [["embed.weight", "head.weight"]]
    assert said["tensors"]["scale"] == {"dtype": "float32", "shape": [], "role": "buffer"}
    file = done.path / "model.safetensors"
    *rest, last = file.read_bytes()
    file.write_bytes(bytes([*rest, last ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        verify_folder(Files(), str(done.path))


def test_what_is_asked_for_is_looked_at_before_anything_is_written(tmp_path: Path) -> None:
    model = TRAVELLERS["own"]()
    run = run_of(tmp_path / "run", model)
    (tmp_path / "there").mkdir()
    calls: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (WeightsExportError, "there exists: delete it", {"path": tmp_path / "there"}),
        (ArgumentError, "format must be one of safetensors", {"format": "zip"}),
        (ArgumentError, "tokenizer is no argument of format", {"tokenizer": object()}),
        (ArgumentError, "source is a model", {"source": model, "model": model}),
        (ArgumentError, "found int", {"source": 3}),
        (CheckpointError, "no item 'ema'; it has", {"item": "ema"}),
        (WeightsExportError, "progress has no tensors by name", {"item": "progress"}),
        (
            WeightsExportError,
            "another model than Linear: it lacks weight",
            {"model": nn.Linear(1, 1)},
        ),
        (WeightsExportError, "no architecture", {"format": "huggingface"}),
    ]
    for kind, message, given in calls:
        with pytest.raises(kind, match=message):
            actckpt.export(**{"source": run, "path": tmp_path / "out", **given})
    assert sorted(os.listdir(tmp_path)) == ["run", "there"]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", ["complex128", "meta", "sparse", "quantized"])
def test_tensors_that_no_file_can_hold(name: str, tmp_path: Path) -> None:
    model = nn.Module()
    tensor, said = {
        "complex128": (torch.zeros(2, dtype=torch.complex128), "no name for"),
        "meta": (torch.zeros(2, device="meta"), "meta device"),
        "sparse": (torch.eye(2).to_sparse(), "dense"),
        "quantized": (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "dequantize"),
    }[name]
    model.register_buffer("x", tensor)
    with pytest.raises(WeightsExportError, match=f"has x .*{said}"):
        actckpt.export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    model = TRAVELLERS["own"]()
    told = actckpt.export(model, tmp_path / "out", dry_run=True)
    assert os.listdir(tmp_path) == []
    assert "nothing was written" in str(told)
    assert told.weights_bytes == sum(t.nbytes for t in expected(model).values())
    done = actckpt.export(model, tmp_path / "out")
    assert 0 < done.size_bytes - told.weights_bytes < 2000
