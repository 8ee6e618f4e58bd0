"""Frozen tensors in object stores: there before those that name them, once, and no longer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import actckpt
from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.names import FROZEN
from actckpt.checkpoint.object_store import ObjectStore
from tests.broken_store import broken_uploads
from tests.frozen_run import advance, bases, damage, objects
from tests.small_run import state
from tests.test_checkpoint_encoding import same
from tests.test_tiers import URL, _empty_store, run_of, stored

__all__ = ["_empty_store"]


def in_store() -> set[str]:
    return {path.rpartition("/")[2] for path in MemoryFileSystem.store if f"/{FROZEN}/" in path}


def test_a_lost_machine_goes_on_from_a_store_which_has_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[str] = []
    put_file = MemoryFileSystem.put_file

    def counting(self: MemoryFileSystem, local: str, remote: str, **how: Any) -> None:
        put.append(remote.rpartition("/")[2])
        put_file(self, local, remote, **how)

    monkeypatch.setattr(MemoryFileSystem, "put_file", counting)
    made = objects()
    tiers = [(URL, 1, 2)]
    with run_of(made, tmp_path / "a", every=2, tiers=tiers) as run:
        for _ in range(3):
            advance(run, made, 2)
            run._places.end_uploads()
        files = {path.name for path in bases(tmp_path / "a")}
    assert in_store() == files
    assert all(put.count(name) == 1 for name in files)
    assert put.count("model.safetensors") == 3
    shutil.rmtree(tmp_path / "a")
    other = objects(1)
    with run_of(other, tmp_path / "a", every=2, tiers=tiers) as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.step == 6
        assert same(state(other), state(made))
        assert {path.name for path in bases(tmp_path / "a")} == files
        # another content: that of before goes with the last that names it
        other["model"].first.weight.data += 1
        for _ in range(3):
            advance(run, other, 2)
            run._places.end_uploads()
    assert stored() == [12, 10]
    assert in_store() == {path.name for path in bases(tmp_path / "a")} != files


def two(path: Path) -> tuple[Checkpoint, Checkpoint]:
    """Checkpoints whose frozen tensors are others."""
    made = objects()
    with run_of(made, path, every=None, keep_last=None) as run:
        advance(run, made)
        first = run.save()
        made["model"].first.weight.data += 1
        advance(run, made)
        run.save()
        advance(run, made)
        second = run.save()
    assert not {*first.manifest.base} >= {*second.manifest.base}
    return first, second


def test_an_upload_that_breaks_off_anywhere_shows_nothing_and_loses_nothing(tmp_path: Path) -> None:
    first, second = two(tmp_path / "a")
    seen = set()
    for _, steps, whole in broken_uploads(first, second, tmp_path):
        seen.add(steps)
        store = ObjectStore("broken://bucket/a", "full")
        store.clean()
        named = {f.rpartition("/")[2] for s in store.stored()[0] for f in s.manifest.base}
        assert in_store() == named
        if not whole:
            store.upload(second)
            assert stored("broken://bucket/a")[0] == 3
    assert seen == {(1,), (3, 1), (3,)}


def test_what_the_store_has_turned_a_bit_of_is_found_and_written_anew(tmp_path: Path) -> None:
    first, _ = two(tmp_path / "a")
    store = ObjectStore(URL, "full")
    store.upload(first)
    (path,) = [p for p in MemoryFileSystem.store if f"/{FROZEN}/" in p]
    whole = MemoryFileSystem.store[path].getvalue()
    MemoryFileSystem.store[path].seek(len(whole) - 5)
    MemoryFileSystem.store[path].write(b"\x07")
    (tmp_path / "b").mkdir()
    with pytest.raises(actckpt.CheckpointFormatError, match="damaged"):
        store.fetch(store.stored()[0][0], Files(), str(tmp_path / "b"))
    assert not bases(tmp_path / "b")
    # another process does not take it for whole
    shutil.copytree(first.path, tmp_path / "c" / "step-00000001.1")
    shutil.copytree(tmp_path / "a" / FROZEN, tmp_path / "c" / FROZEN)
    again = Checkpoint(tmp_path / "c" / "step-00000001.1", first.manifest)
    ObjectStore(URL, "full").upload(again)
    assert MemoryFileSystem.store[path].getvalue() == whole
    # what is here and damaged is fetched anew
    damage(bases(tmp_path / "c")[0])
    store.fetch(store.stored()[0][0], Files(), str(tmp_path / "c")).verify()
