"""``actckpt checkpoint diff | prune | export``, and `actckpt.export_weights`."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import actckpt
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.journal_file import Lines, path_of
from actckpt.checkpoint.journal_lines import Saved, Step
from actckpt.checkpoint.verification import verify_files
from actckpt.cli import main
from tests.test_checkpoint_corruption import make
from tests.test_checkpoint_encoding import same

pytestmark = pytest.mark.filterwarnings("ignore:export_weights is deprecated:DeprecationWarning")

Capture = pytest.CaptureFixture[str]


class Tied(nn.Module):
    """Two layers of one weight, a buffer, and what only an extra state can hold."""

    def __init__(self, extra: Any = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(7))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def saved(directory: Path, model: nn.Module, steps: int = 1, **more: Any) -> None:
    """A run of some checkpoints, of losses 1, 2, …"""
    with actckpt.Checkpointer(directory, model=model, every=1, keep_last=None, **more) as run:
        for loss in range(1, steps + 1):
            run.step({"loss": loss})


def names(directory: Path) -> list[str]:
    return sorted(n for n in os.listdir(directory) if n.startswith("step-"))


def command(*argv: object) -> int:
    return main(["checkpoint", *map(str, argv)])


# export


def test_exported_weights_are_the_models(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Tied()
    saved(tmp_path / "run", model, steps=2)
    with caplog.at_level(logging.WARNING, "actckpt"):
        out = actckpt.export_weights(tmp_path / "run", tmp_path / "out.safetensors")
    assert out == tmp_path / "out.safetensors"
    assert "not exported, no tensors: _extra_state" in caplog.text
    found = load_file(out)
    expected = {k: v for k, v in model.state_dict().items() if k != "_extra_state"}
    assert same(dict(sorted(found.items())), dict(sorted(expected.items())))
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "run"]
    with actckpt.Checkpointer(tmp_path / "run", model=model) as run:
        older = run.list()[1]
    again = actckpt.export_weights(older, tmp_path / "older.safetensors")
    assert again.read_bytes() == out.read_bytes()


def test_the_one_file_is_deprecated(tmp_path: Path) -> None:
    saved(tmp_path / "run", nn.Linear(2, 2))
    with pytest.warns(DeprecationWarning, match=r"actckpt\.export\(checkpoint, folder"):
        actckpt.export_weights(tmp_path / "run", tmp_path / "out.safetensors")


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    model = nn.Linear(2, 2)
    big = nn.ParameterDict({"x": torch.zeros(2, dtype=torch.complex128)})
    saved(run, model, extra={"big": big})
    out.write_text("mine")
    for item, path, message in (
        ("model", out, "out.safetensors exists: delete it"),
        ("ema", out, "has no item 'ema'; it has"),
        ("progress", out, "progress has no tensors by name"),
        ("extra-big", out, "complex128, which safetensors"),
        ("model", tmp_path / "none" / "x", "could not be written: .*No such file"),
    ):
        with pytest.raises(actckpt.CheckpointError, match=message):
            actckpt.export_weights(run, path, item=item)
    with pytest.raises(actckpt.CheckpointError, match="holds no checkpoints"):
        actckpt.export_weights(tmp_path / "elsewhere", out)
    weights = run / "step-00000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(actckpt.CheckpointFormatError, match="truncated"):
        actckpt.export_weights(run, tmp_path / "new")
    assert out.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "run"]


def test_export_by_command(tmp_path: Path, capsys: Capture) -> None:
    saved(tmp_path / "run", nn.Linear(2, 2))
    out = tmp_path / "out.safetensors"
    assert command("export", tmp_path / "run" / "step-00000001", out) == 0
    assert f"{out}: {out.stat().st_size} bytes" in capsys.readouterr().out
    assert command("export", tmp_path / "run", out) == 2
    assert "exists" in capsys.readouterr().err


# diff


def test_the_same_state_twice(tmp_path: Path, capsys: Capture) -> None:
    for name, serial in (("a", 1), ("b", 5)):
        (tmp_path / name).mkdir()
        make(tmp_path / name, 1, serial)
    assert command("diff", tmp_path / "a", tmp_path / "b" / "step-00000001") == 0
    assert "bit for bit" in capsys.readouterr().out


def test_every_difference_has_a_line(tmp_path: Path, capsys: Capture) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2, serial=2)
    assert command("diff", tmp_path / "step-00000001", tmp_path) == 1
    out = capsys.readouterr().out
    assert "model/a: float32 [50, 3], 150 of 150 elements differ, by at most" in out
    assert "model/b" not in out
    assert "optimizer/lr: 0.1 | 0.2" in out
    assert "3 values differ" in out


def test_other_shapes_and_what_only_one_has(tmp_path: Path, capsys: Capture) -> None:
    saved(tmp_path / "a", nn.Linear(2, 2))
    saved(tmp_path / "b", nn.Linear(2, 3, bias=False), extra={"more": nn.Linear(1, 1)})
    assert command("diff", tmp_path / "a", tmp_path / "b") == 1
    out = capsys.readouterr().out
    assert "model/weight: float32 [2, 2] | float32 [3, 2]" in out
    assert "model/bias: float32 [2] | absent" in out
    assert "extra-more: absent | " in out
    (tmp_path / "b" / "step-00000001" / "state.json").unlink()
    assert command("diff", tmp_path / "a", tmp_path / "b") == 2
    assert "state.json cannot be read" in capsys.readouterr().err


# show


def test_models_of_the_same_tensors_show_the_same_fingerprint(
    tmp_path: Path, capsys: Capture
) -> None:
    def shown(name: str, model: nn.Module) -> str:
        saved(tmp_path / name, model)
        assert command("show", tmp_path / name) == 0
        (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("model xxh3"))
        return line

    first = shown("a", nn.Linear(2, 3))
    assert shown("b", nn.Linear(2, 3)) == first
    others = [nn.Linear(3, 2), nn.Linear(2, 3).double(), nn.Sequential(nn.Linear(2, 3))]
    assert first not in [shown(str(n), other) for n, other in enumerate(others)]


# all of them


@pytest.mark.parametrize("name", ["show", "verify", "ls", "prune", "diff", "export"])
def test_what_is_no_run_is_one_clear_error(name: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file, tmp_path, tmp_path / "none"):
        second = {"diff": [path], "export": [tmp_path / "new"]}.get(name, [])
        assert command(name, path, *second) == 2
        err = capsys.readouterr().err
        assert str(path) in err
        assert err.count("\n") == 1


# verify


def test_what_a_run_deletes_while_it_is_verified_is_no_damage(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, nn.Linear(2, 2), steps=2)

    def overtaken(files: Files, directory: str) -> Any:
        if directory.endswith("step-00000001"):
            shutil.rmtree(directory)
        return verify_files(files, directory)

    monkeypatch.setattr("actckpt.commands.checkpoint.verify_files", overtaken)
    assert command("verify", tmp_path) == 0
    assert "step-00000001: was deleted in the meantime" in capsys.readouterr().out


# prune


def test_a_dry_run_deletes_nothing(tmp_path: Path, capsys: Capture) -> None:
    saved(tmp_path, nn.Linear(2, 2), steps=5)
    with actckpt.Checkpointer(tmp_path, model=nn.Linear(2, 2)) as run:
        run.pin(2)
        # even while somebody writes there
        assert command("prune", tmp_path, "--dry-run", "--keep-last", 1) == 0
    out = capsys.readouterr().out
    assert out.count("would be deleted") == 4
    assert "step-00000002  stays" in out
    assert "3 of 5 would be deleted" in out
    assert len(names(tmp_path)) == 5


def test_pruned_as_a_checkpointer_would(tmp_path: Path, capsys: Capture) -> None:
    saved(tmp_path, nn.Linear(2, 2), steps=7)
    (tmp_path / ".saving-step-00000009-1-a").mkdir()
    keep = ("--keep-last", 1, "--keep-best", "loss", "min", 2, "--keep-every", 3)
    assert command("prune", tmp_path, *keep) == 0
    assert names(tmp_path) == [f"step-0000000{n}" for n in (1, 2, 3, 6, 7)]
    assert sorted(os.listdir(tmp_path))[:3] == [".lock", "journal.jsonl", "step-00000001"]
    assert "2 of 7 deleted" in capsys.readouterr().out


def journaled(directory: Path) -> tuple[set[int], set[int]]:
    """The steps of a journal, and the checkpoints that it says were saved."""
    with Files().reading(path_of(str(directory))) as source:
        records = [record for record, _ in Lines(source)]
    steps = {r.step for r in records if isinstance(r, Step)}
    return steps, {r.step for r in records if isinstance(r, Saved)}


def test_the_journal_is_cut_with_what_is_pruned(tmp_path: Path, capsys: Capture) -> None:
    def another() -> actckpt.Checkpointer:
        options: dict[str, Any] = {"every": 2, "keep_last": None, "background": False}
        return actckpt.Checkpointer(tmp_path, model=nn.Linear(2, 2), **options)

    with another() as run:
        for _ in range(7):
            run.step()
    assert journaled(tmp_path) == ({3, 4, 5, 6, 7}, {2, 4, 6})
    before = path_of(str(tmp_path))
    size_bytes = Path(before).stat().st_size
    assert command("prune", tmp_path, "--keep-last", 1, "--dry-run") == 0
    assert Path(before).stat().st_size == size_bytes
    assert command("prune", tmp_path, "--keep-last", 2) == 0
    assert journaled(tmp_path) == ({5, 6, 7}, {4, 6})
    with another() as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.checkpoint.step == 6
        run.step()
        assert run.verified.steps == 1
        assert run.verified.difference is None


def test_nothing_is_pruned_where_that_is_not_safe(tmp_path: Path, capsys: Capture) -> None:
    saved(tmp_path, nn.Linear(2, 2), steps=3)
    with actckpt.Checkpointer(tmp_path, model=nn.Linear(2, 2)) as run:
        run.resume()
        assert command("prune", tmp_path, "--keep-last", 1) == 2
        assert "another Checkpointer" in capsys.readouterr().err
    assert command("prune", tmp_path, "--keep-last", 0) == 2
    assert "keep_last must be at least 1" in capsys.readouterr().err
    assert command("prune", tmp_path / "none") == 2
    assert "holds no checkpoints" in capsys.readouterr().err
    weights = tmp_path / "step-00000003" / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert command("prune", tmp_path, "--keep-last", 1) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert len(names(tmp_path)) == 3
