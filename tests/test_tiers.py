"""Checkpoints in several places: the newest that verifies wins, what fails beside is no loss."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import actckpt
from actckpt.checkpoint.names import MANIFEST
from actckpt.checkpoint.object_store import INDEX, ObjectStore
from actckpt.cli import main
from tests.broken_store import Broken, broken_uploads
from tests.small_run import advance, objects, state
from tests.test_checkpoint_encoding import same

URL = "memory://bucket/a"


@pytest.fixture(autouse=True)
def _empty_store() -> Iterator[None]:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield
    MemoryFileSystem.store.clear()


def run_of(made: dict[str, Any], path: Path, **how: Any) -> actckpt.Checkpointer:
    return actckpt.Checkpointer(path, **made, **{"every": 4, "keep_last": 2, **how})


def stored(url: str = URL) -> list[int]:
    """Steps of the checkpoints in a store, newest first."""
    return [s.manifest.step for s in ObjectStore(url, "full").stored()[0]]


def resumed(path: Path, **how: Any) -> tuple[dict[str, Any], actckpt.Resumed | None]:
    """Objects of another beginning, put back."""
    made = objects(seed=1)
    with run_of(made, path, **how) as run:
        return made, run.resume()


def test_a_faster_folder_has_what_the_durable_one_lacks_and_a_lagging_one_never_wins(
    tmp_path: Path,
) -> None:
    fast = (tmp_path / "fast", 1, 2)
    made = objects()
    with run_of(made, tmp_path / "a", tiers=[fast]) as run:
        advance(run, made, 6)
        found = [(c.step, c.path.parent.name) for c in run.list()]
    assert found == [(6, "fast"), (5, "fast"), (4, "a")]
    other, result = resumed(tmp_path / "a", tiers=[fast])
    assert result is not None
    assert (result.step, result.checkpoint.path.parent.name) == (6, "fast")
    assert same(state(other), state(made))
    # the folder in memory is as it was when the machine is up again, and the run has gone on
    shutil.copytree(tmp_path / "fast", tmp_path / "old")
    with run_of(made, tmp_path / "a", tiers=[fast]) as run:
        run.resume()
        advance(run, made, 2)
    shutil.rmtree(tmp_path / "fast")
    shutil.move(tmp_path / "old", tmp_path / "fast")
    other, result = resumed(tmp_path / "a", tiers=[fast])
    assert result is not None
    assert (result.step, result.checkpoint.path.parent.name) == (8, "a")
    assert same(state(other), state(made))


def test_the_same_run_with_and_without_tiers_has_the_same_bits(tmp_path: Path) -> None:
    plain, tiered = objects(), objects()
    for made, how in ((plain, {}), (tiered, {"tiers": [(tmp_path / "fast", 1)]})):
        run = run_of(made, tmp_path / f"{len(how)}", **how)
        torch.manual_seed(7)
        advance(run, made, 9)
        run.close()
    assert same(state(plain), state(tiered))


def test_a_damaged_newest_gives_way_to_the_next_wherever_that_is(tmp_path: Path) -> None:
    fast = (tmp_path / "fast", 1, 2)
    made = objects()
    with run_of(made, tmp_path / "a", tiers=[fast, (URL, 4, 1)]) as run:
        advance(run, made, 4)
        at_four = state(made)
        advance(run, made, 1)
    for folder, step in (("fast", 5), ("fast", 4), ("a", 4)):
        damage(tmp_path / folder / f"step-{step:08d}" / "model.safetensors")
    assert stored() == [4]
    other, result = resumed(tmp_path / "a", tiers=[fast, (URL, 4, 1)])
    assert result is not None
    assert result.step == 4
    # brought here from the store, under a name of its own
    assert result.checkpoint.path == tmp_path / "a" / "step-00000004.1"
    assert len(result.skipped) == 3
    assert same(state(other), at_four)


def damage(path: Path) -> None:
    """Turns one bit of a file."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("url", [URL, "file"])
def test_a_lost_machine_goes_on_from_the_store(url: str, tmp_path: Path) -> None:
    tiers = [(f"file://{tmp_path}/store" if url == "file" else url, 4, 2)]
    made = objects()
    with run_of(made, tmp_path / "a", tiers=tiers) as run:
        advance(run, made, 13)
        run.save()
    # every fourth, and the last at the end; two of them stay
    assert stored(str(tiers[0][0])) == [13, 12]
    shutil.rmtree(tmp_path / "a")
    other, result = resumed(tmp_path / "a", tiers=tiers)
    assert result is not None
    assert result.step == 13
    assert same(state(other), state(made))
    # what came from there is the run's own: it goes when newer ones are there
    with run_of(made, tmp_path / "a", tiers=tiers) as run:
        run.resume()
        advance(run, made, 8)
        assert [c.step for c in run.list()] == [20, 16]
    assert stored(str(tiers[0][0])) == [20, 16]


def test_an_upload_that_breaks_off_anywhere_shows_nothing_and_loses_nothing(tmp_path: Path) -> None:
    made = objects()
    with run_of(made, tmp_path / "a") as run:
        advance(run, made, 4)
        first = run.list()[0]
        advance(run, made, 4)
        second = run.list()[0]
    seen = set()
    for store, steps, whole in broken_uploads(first, second, tmp_path):
        seen.add(steps)
        if not whole:
            store.clean()
            store.upload(second)
            assert stored("broken://bucket/a")[0] == 8
    assert seen == {(4,), (8, 4), (8,)}


def test_a_store_that_fails_is_a_warning_and_an_error_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Broken.left = 0
    made = objects()
    run = run_of(made, tmp_path / "a", tiers=[("broken://bucket/a", 4, 1)])
    advance(run, made, 9)
    with pytest.raises(actckpt.CheckpointSaveError, match="could not be copied to broken://"):
        run.close()
    assert "the network is gone" in caplog.text
    _, result = resumed(tmp_path / "a")
    assert result is not None
    assert result.step == 8
    Broken.left = 10_000


def test_a_listing_that_lags_behind_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = objects()
    with run_of(made, tmp_path / "a", tiers=[(URL, 4, 2)]) as run:
        advance(run, made, 8)
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda self, path, detail=False: [])
    assert stored() == [8, 4]
    # and without the index what is listed counts
    monkeypatch.undo()
    del MemoryFileSystem.store["/bucket/a/" + INDEX]
    assert stored() == [8, 4]


def test_what_the_store_has_turned_a_bit_of_is_found_on_arrival(tmp_path: Path) -> None:
    made = objects()
    with run_of(made, tmp_path / "a", tiers=[(URL, 4, 2)]) as run:
        advance(run, made, 4)
        at_four = state(made)
        advance(run, made, 4)
    shutil.rmtree(tmp_path / "a")
    path = "/bucket/a/step-00000008/model.safetensors"
    data = bytearray(fsspec.filesystem("memory").cat_file(path))
    data[len(data) // 2] ^= 4
    fsspec.filesystem("memory").pipe_file(path, bytes(data))
    other, result = resumed(tmp_path / "a", tiers=[(URL, 4, 2)])
    assert result is not None
    assert result.step == 4
    assert "model.safetensors is damaged" in result.skipped[0].reason
    assert same(state(other), at_four)
    # nothing half-fetched is left
    assert not [p for p in (tmp_path / "a").iterdir() if p.name.startswith(".saving")]


def test_a_damaged_copy_is_no_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = MemoryFileSystem.put_file

    def lossy(self: MemoryFileSystem, local: str, remote: str, **how: Any) -> None:
        put(self, local, remote, **how)
        if remote.endswith("model.safetensors"):
            data = bytearray(self.cat_file(remote))
            data[-1] ^= 1
            self.pipe_file(remote, bytes(data))

    monkeypatch.setattr(MemoryFileSystem, "put_file", lossy)
    made = objects()
    run = run_of(made, tmp_path / "a", tiers=[(URL, 4, 1)])
    advance(run, made, 4)
    with pytest.raises(actckpt.CheckpointSaveError, match="is damaged"):
        run.close()
    assert stored() == []


def test_a_checkpoint_is_not_retired_while_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, go = MemoryFileSystem.put_file, threading.Event()

    def slow(self: MemoryFileSystem, local: str, remote: str, **how: Any) -> None:
        assert go.wait(20)
        put(self, local, remote, **how)

    monkeypatch.setattr(MemoryFileSystem, "put_file", slow)
    made = objects()
    with run_of(made, tmp_path / "a", every=1, keep_last=1, tiers=[(URL, 1, 3)]) as run:
        advance(run, made, 4)
        # the first is on its way, the last waits: the third gave way to it and goes with the next
        assert [c.step for c in run.list()] == [4, 3, 1]
        go.set()
    assert stored() == [4, 1]


def test_a_store_of_another_run_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    made = objects()
    with run_of(made, tmp_path / "a", tiers=[(URL, 4, 1)]) as run:
        advance(run, made, 4)
    other = run_of(objects(), tmp_path / "b", tiers=[(URL, 4, 1)])
    with pytest.raises(actckpt.CheckpointError, match="did not go on from there"):
        other.step()
    fresh = run_of(objects(), tmp_path / "b", tiers=[(URL, 4, 1)], fresh=True)
    with pytest.raises(actckpt.CheckpointError, match="fresh=True moves nothing in a store"):
        fresh.resume()
    assert stored() == [4]


def test_no_run_begins_anew_because_a_store_is_out_of_reach(tmp_path: Path) -> None:
    tiers = [("nosuch://bucket/a", 4, 1)]
    with (
        run_of(objects(), tmp_path / "a", tiers=tiers) as run,
        pytest.raises(actckpt.CheckpointError, match="To begin anew, leave that tier out"),
    ):
        run.resume()
    made = objects()
    with run_of(made, tmp_path / "a") as run:
        advance(run, made, 4)
    # there is one here: it counts, and a note says what was not looked at
    run = run_of(objects(), tmp_path / "a", tiers=tiers)
    result = run.resume()
    assert result is not None
    assert result.step == 4
    assert "nosuch://bucket/a cannot be read now" in result.notes[-1]


def test_ls_shows_what_lies_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = objects()
    with run_of(made, tmp_path / "a", tiers=[(tmp_path / "fast", 1), (URL, 4, 1)]) as run:
        advance(run, made, 5)
    places = ["a", "fast", URL]
    assert main(["checkpoint", "ls", *places]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert rows == [[places[1], "step-00000005"], [places[0], "step-00000004"],
                    [URL, "step-00000004"]]  # fmt: skip
    assert main(["checkpoint", "ls", URL]) == 0
    assert capsys.readouterr().out.split()[0] == "step-00000004"
    assert main(["checkpoint", "ls", "memory://bucket/none"]) == 2


def test_a_folder_that_fails_beside_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = objects()
    with run_of(made, tmp_path / "a", tiers=[(tmp_path / "fast", 1, 1)]) as run:
        advance(run, made, 1)
        assert run.list()  # nothing is being written now
        shutil.rmtree(tmp_path / "fast")
        advance(run, made, 3)
    assert "could not be saved" in caplog.text
    assert (tmp_path / "a" / "step-00000004" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        ([("x", None, 1)], "a tier needs every="),
        ([("x", "auto", 1)], "a tier needs every="),
        ([("x", 0, 1)], "every must be a number of steps"),
        ([("x", 5, 0)], "keeps at least 1 checkpoint"),
        (["x"], "takes actckpt.Tier objects or tuples"),
        ([("x", 5), ("x", 6)], "names x twice"),
        ([("a", 5)], "needs a folder of its own"),
    ],
)
def test_tiers_that_are_none(
    tiers: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(actckpt.ArgumentError, match=says):
        run_of(objects(), tmp_path / "a", tiers=tiers)
    assert not list(tmp_path.iterdir())


# whose a store's checkpoints are, and which are newer


def in_store(path: Path, steps: int, **how: Any) -> dict[str, Any]:
    """A run with a checkpoint at each step, all of them in the store too."""
    made = objects()
    with run_of(made, path, every=1, keep_last=None, tiers=[(URL, 1, 9)], **how) as run:
        for _ in range(steps):
            advance(run, made, 1)
            run._saver.wait()
            for uploads in run._places._stores:
                uploads.wait()
    assert stored() == [*range(steps, 0, -1)]
    return made


def test_looking_at_a_store_does_not_make_it_ones_own(tmp_path: Path) -> None:
    in_store(tmp_path / "a", 4)
    other = objects()
    with run_of(other, tmp_path / "a", every=1, keep_last=1, tiers=[(URL, 1, 1)]) as run:
        run.restore(only=["model"])
        advance(run, other, 1)
    assert stored() == [1, 4, 3, 2, 1]
    assert len(run.list()) == 5


def test_a_run_that_went_back_is_the_newest_in_the_store_too(tmp_path: Path) -> None:
    in_store(tmp_path / "a", 5)
    shutil.rmtree(tmp_path / "a")
    other = objects()
    with run_of(other, tmp_path / "a", every=1, tiers=[(URL, 1, 9)]) as run:
        run.restore(2)
        advance(run, other, 1)
    assert stored()[0] == 3
    shutil.rmtree(tmp_path / "a")
    made, result = resumed(tmp_path / "a", tiers=[(URL, 1, 9)])
    assert result is not None
    assert result.step == 3
    assert same(state(made), state(other))


def test_a_store_that_could_not_be_read_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_store(tmp_path / "a", 5)
    for step in (3, 4, 5):
        shutil.rmtree(tmp_path / "a" / f"step-{step:08d}")
    other = objects()
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "ls", lambda *args, **how: [][0])
        run = run_of(other, tmp_path / "a", every=1, tiers=[(URL, 1, 9)])
        result = run.resume()
    assert result is not None
    assert result.step == 2
    advance(run, other, 1)
    with pytest.raises(actckpt.CheckpointSaveError, match="saved later than what it went on from"):
        run.close()
    assert stored()[0] == 5


def test_what_is_in_sight_is_not_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, paths = MemoryFileSystem.put_file, []

    def counting(self: MemoryFileSystem, local: str, remote: str, **how: Any) -> None:
        paths.append(remote)
        put(self, local, remote, **how)

    monkeypatch.setattr(MemoryFileSystem, "put_file", counting)
    made = objects()
    with run_of(made, tmp_path / "a", every=1, tiers=[(URL, 1, 9)]) as run:
        advance(run, made, 1)
        newest = run.list()[0]
    assert len(paths) == len(set(paths)) > 2
    ObjectStore(URL, "full").upload(newest)
    assert len(paths) == len(set(paths))


def test_a_lost_manifest_is_no_new_beginning(tmp_path: Path) -> None:
    in_store(tmp_path / "a", 1)
    shutil.rmtree(tmp_path / "a")
    del MemoryFileSystem.store["/bucket/a/step-00000001/" + MANIFEST]
    with (
        run_of(objects(), tmp_path / "a", tiers=[(URL, 1, 9)]) as run,
        pytest.raises(actckpt.CheckpointError, match=f"{MANIFEST} is missing"),
    ):
        run.resume()
    ObjectStore(URL, "full").clean()
    assert "/bucket/a/step-00000001/model.safetensors" in MemoryFileSystem.store


def test_what_somebody_has_deleted_in_a_store_is_no_hindrance(tmp_path: Path) -> None:
    made = in_store(tmp_path / "a", 3)
    with run_of(made, tmp_path / "a", every=1, tiers=[(URL, 1, 1)]) as run:
        run.resume()
        fsspec.filesystem("memory").rm("/bucket/a/step-00000002", recursive=True)
        advance(run, made, 1)
    assert stored() == [4]


def test_what_two_stores_read_stays_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, go = MemoryFileSystem.put_file, threading.Event()

    def slow(self: MemoryFileSystem, local: str, remote: str, **how: Any) -> None:
        if "/slow/" in remote:
            assert go.wait(20)
        put(self, local, remote, **how)

    monkeypatch.setattr(MemoryFileSystem, "put_file", slow)
    made = objects()
    tiers = [(URL, 1, 9), ("memory://bucket/slow", 1, 9)]
    with run_of(made, tmp_path / "a", every=1, keep_last=1, tiers=tiers) as run:
        for _ in range(3):
            advance(run, made, 1)
            run._saver.wait()
            run._places._stores[0].wait()
        go.set()
    assert stored() == [3, 2, 1]
    assert stored("memory://bucket/slow") == [3, 1]


def test_a_folder_beside_that_cannot_be_made_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = objects()
    run = run_of(made, tmp_path / "a", tiers=[(tmp_path / "fast", 1, 1)])
    (tmp_path / "fast").write_text("in the way")
    assert run.resume() is None
    advance(run, made, 4)
    run.close()
    assert "fast" in caplog.text
    assert [c.step for c in run.list()] == [4]
