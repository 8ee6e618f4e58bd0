"""What nobody trains is stored once, is never taken for what it was, and is nobody's alone."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.checkpoint.difference import differences
from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.names import FROZEN, base_file
from actckpt.checkpoint.reading import read_checkpoint, read_state
from actckpt.cli import main
from actckpt.errors import CheckpointFormatError
from actckpt.resuming import run_state
from tests.frozen_run import advance, bases, damage, objects
from tests.small_run import objects as trained_objects
from tests.small_run import state
from tests.test_checkpoint_corruption import forge
from tests.test_checkpoint_encoding import same

Capture = pytest.CaptureFixture[str]
LAYERS = {"model/first.weight", "model/second.weight"}


def run_of(made: dict[str, Any], path: Path, **how: Any) -> actckpt.Checkpointer:
    return actckpt.Checkpointer(path, **made, **{"every": 1, "keep_last": 3, **how})


def frozen(checkpoint: Checkpoint) -> set[str]:
    return set(checkpoint.manifest.in_base)


def test_it_is_written_once_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    made = objects()
    sizes = []
    with run_of(made, tmp_path / "a", every=None) as run:
        for _ in range(4):
            advance(run, made)
            sizes.append(sum(path.stat().st_size for path in run.save().path.iterdir()))
        found = run.list()
    layer = 40 * 40 * 4
    # both layers are one from the first, and the mask is seen to stay at the second save
    assert sizes[0] - sizes[1] > layer - 1000
    assert max(sizes[1:]) - min(sizes[1:]) < 100
    assert all(layer < path.stat().st_size < layer + 1000 for path in bases(tmp_path / "a"))
    assert [frozen(c) for c in found] == [LAYERS | {"model/mask"}] * 3
    assert len(bases(tmp_path / "a")) == 2
    other = objects(1)
    with run_of(other, tmp_path / "a") as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.step == 4
        assert same(state(other), state(made))
        advance(run, other)
        assert frozen(run.list()[0]) == frozen(found[0])
    assert len(bases(tmp_path / "a")) == 2


def test_what_is_read_is_what_a_run_without_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        made = objects()
        with run_of(made, tmp_path / name) as run:
            advance(run, made, 3)
        monkeypatch.setattr(run_state, "with_frozen", lambda encoded, objects: encoded)
    (one, items), (other, others) = (
        read_checkpoint(Files(), str(tmp_path / name)) for name in ("a", "b")
    )
    assert one.manifest.base
    assert not other.manifest.base
    assert not [*differences(items, others)]
    # of one content, and two all the same
    first, second = (items["model"][f"{name}.weight"] for name in ("first", "second"))
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    for name in ("a", "b"):
        actckpt.export(tmp_path / name, tmp_path / f"{name}-out", format="safetensors")
    assert (tmp_path / "a-out" / "model.safetensors").read_bytes() == (
        tmp_path / "b-out" / "model.safetensors"
    ).read_bytes()
    model = objects(1)["model"]
    assert not actckpt.load_weights(model, tmp_path / "a").missing
    assert same(model.state_dict(), others["model"])
    actckpt.average_weights(model, [c.path for c in (one, other)])
    assert torch.equal(model.first.weight, first)


def test_a_run_that_trains_all_writes_the_version_that_it_always_did(tmp_path: Path) -> None:
    made = trained_objects(2000)
    with run_of(made, tmp_path) as run:
        run.step()
        run.step()
        saved = run.list()[0]
    text = json.loads((saved.path / "manifest.json").read_bytes())
    assert text["format_version"] == 1
    assert list(text) == [
        "format", "format_version", "step", "serial", "saved_at_s", "tag", "metrics",
        "fingerprint", "versions", "files", "tensors", "checksum",
    ]  # fmt: skip
    assert not (tmp_path / FROZEN).exists()
    assert {*saved.manifest.files, "manifest.json"} == {*os.listdir(saved.path)}


def test_what_is_changed_by_hand_is_noticed_and_the_old_stays(tmp_path: Path) -> None:
    made = objects()
    weight = made["model"].first.weight
    states = {}
    with run_of(made, tmp_path, keep_last=None) as run:
        for step in range(1, 7):
            if step == 3:
                weight.data[0, 0] += 1  # no version counts this
            advance(run, made)
            states[step] = copy.deepcopy(made["model"].state_dict())
        found = {c.step: c for c in run.list()}
    # it goes with the checkpoint until it is seen to stay
    assert {step: "model/first.weight" in frozen(c) for step, c in found.items()} == {
        1: True, 2: True, 3: False, 4: True, 5: True, 6: True,
    }  # fmt: skip
    for step, checkpoint in found.items():
        assert same(read_state(Files(), str(checkpoint.path))[1]["model"], states[step])
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-last", "2"]) == 0
    named = {name for step in (5, 6) for name in found[step].manifest.base}
    assert {f"{FROZEN}/{path.name}" for path in bases(tmp_path)} == named


class Following(nn.Module):
    """An average of the weights that asks for no gradient, and follows each step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = objects()["model"].requires_grad_(False)

    def follow(self) -> None:
        with torch.no_grad():
            self.inner.mask += 1
            self.inner.second.weight += 1


def test_an_average_that_follows_is_not_taken_for_frozen(tmp_path: Path) -> None:
    made = {**objects(), "ema": Following()}
    with run_of(made, tmp_path) as run:
        for _ in range(3):
            made["ema"].follow()
            advance(run, made)
        last = run.list()[0]
        before = bases(tmp_path)
        made["ema"].follow()
        advance(run, made)
    assert frozen(last) == LAYERS | {"model/mask", "ema/inner.first.weight"}
    assert bases(tmp_path) == before


def test_a_state_that_is_saved_is_not_saved_again(tmp_path: Path) -> None:
    made = objects()
    with run_of(made, tmp_path, every=None) as run:
        advance(run, made)
        first = run.save()
        assert run.save() == first
        made["model"].second.weight.data[0, 0] += 1
        assert run.save() != first
        damage(bases(tmp_path)[0])
        assert len(run.list()) == 2


def test_damage_is_every_checkpoints_that_names_it(tmp_path: Path, capsys: Capture) -> None:
    made = objects()
    with run_of(made, tmp_path) as run:
        advance(run, made, 3)
        found = run.list()
    assert main(["checkpoint", "ls", str(tmp_path)]) == 0
    assert main(["checkpoint", "show", str(tmp_path)]) == 0
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "kB frozen" in told
    assert "model/first.weight  float32 [40, 40] frozen" in told
    assert told.count(f"bytes in {FROZEN}, sound") == 3
    (shared,) = {file for c in found for file in c.manifest.base if file in found[-1].manifest.base}
    damage(tmp_path / shared)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count(f"{shared} is damaged") == 3
    for checkpoint in found:
        with pytest.raises(CheckpointFormatError, match=f"{FROZEN}.* is damaged"):
            checkpoint.verify()
    with run_of(objects(1), tmp_path) as run, pytest.raises(actckpt.CheckpointError, match="none"):
        run.resume()
    (tmp_path / shared).unlink()
    with pytest.raises(CheckpointFormatError, match=f"copied needs its run's {FROZEN}"):
        found[0].verify()


def test_the_next_save_of_the_same_weights_mends_it(tmp_path: Path) -> None:
    made = objects()
    with run_of(made, tmp_path / "a", tiers=[(tmp_path / "fast", 1, 2)]) as run:
        advance(run, made, 2)
    for path in bases(tmp_path / "a"):
        damage(path)
    other = objects(1)
    with run_of(other, tmp_path / "a", tiers=[(tmp_path / "fast", 1, 2)]) as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.checkpoint.path.parent == tmp_path / "fast"
        assert same(state(other), state(made))
        # the mask, too, once it is seen to stay
        advance(run, other, 2)
        for checkpoint in run.list():
            checkpoint.verify()


def test_a_copy_takes_its_base_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = objects()
    with run_of(made, tmp_path / "a") as run:
        advance(run, made)
        saved = run.list()[0].path
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.symlink(tmp_path / "b" / saved.name, tmp_path / "newest")
    monkeypatch.chdir(tmp_path / "b" / saved.name)
    for way in (".", str(tmp_path / "newest"), f"../{saved.name}"):
        assert main(["checkpoint", "verify", way]) == 0
    monkeypatch.chdir(tmp_path / "b")
    assert main(["checkpoint", "verify", saved.name]) == 0


@pytest.mark.parametrize("name", ["../x.safetensors", "frozen-base/x.safetensors", "", "a.json"])
def test_a_manifest_cannot_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    made = objects()
    with run_of(made, tmp_path) as run:
        advance(run, made)
        saved = run.list()[0].path

    def change(data: dict[str, Any]) -> None:
        (entry,) = data["base"].values()
        data["base"][name] = entry

    forge(saved, change)
    with pytest.raises(CheckpointFormatError, match="not called as its checksum"):
        read_state(Files(), str(saved))


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    made = objects()
    with run_of(made, tmp_path, every=None) as run:
        advance(run, made)
        run.save()
        (tmp_path / FROZEN / "notes.txt").write_text("mine")
        stale = tmp_path / base_file(f"x:{'0' * 32}")
        stale.write_bytes(b"")
        advance(run, made)
        run.save()
        assert not stale.exists()
        # one that cannot be read may name anything
        stale.write_bytes(b"")
        broken = run.list()[0].path
        (broken / "manifest.json").write_bytes(b"{")
        advance(run, made)
        run.save()
        assert stale.exists()
        shutil.rmtree(broken)
        advance(run, made)
        run.save()
    assert not stale.exists()
    assert (tmp_path / FROZEN / "notes.txt").read_text() == "mine"


def test_a_new_beginning_moves_it_along(tmp_path: Path) -> None:
    made = objects()
    with run_of(made, tmp_path) as run:
        advance(run, made, 2)
    before = state(made)
    with run_of(trained_objects(), tmp_path, fresh=True) as run:
        run.step()
    (aside,) = tmp_path.glob("set-aside-*")
    assert not (tmp_path / FROZEN).exists()
    assert main(["checkpoint", "verify", str(aside)]) == 0
    other = objects(1)
    with run_of(other, aside) as run:
        run.resume()
        assert same(state(other), before)
