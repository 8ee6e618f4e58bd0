"""Several at once in one directory: readers never see half a checkpoint, writers take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import actckpt
from actckpt.checkpoint.discovery import discover
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.lock import DirectoryLock
from actckpt.checkpoint.reading import read_checkpoint
from actckpt.checkpoint.retention import Keep, retire
from actckpt.checkpoint.verification import verify_files
from actckpt.errors import CheckpointError, CheckpointFormatError
from actckpt.resuming import choosing
from actckpt.resuming.cadence import Cadence
from actckpt.resuming.company import Alone
from actckpt.resuming.directory import RunDirectory
from actckpt.resuming.places import Places
from tests.system_calls import Call, Make, Watched
from tests.test_checkpoint_corruption import make
from tests.test_checkpoint_encoding import same


def weights(step: int) -> torch.Tensor:
    """What `make` puts into the model."""
    return torch.randn(50, 3, generator=torch.Generator().manual_seed(step))


class Overtaking:
    """A writer that is faster: between two calls of a reader it saves, and retires the rest."""

    def __init__(self, directory: Path, at: int) -> None:
        self.directory, self.at, self.fired = directory, at, 0

    def __call__(self, call: Call, make_call: Make) -> object:
        if call.number == self.at:
            self.fired += 1
            retire(Files(), str(self.directory), replaced(self.directory))
        return make_call(call)


def replaced(directory: Path) -> tuple[actckpt.Checkpoint, ...]:
    """All checkpoints but a new one."""
    old = discover(Files(), str(directory)).checkpoints
    step = old[0].step + 1
    make(directory, step, step)
    return old


def test_a_reader_while_checkpoints_come_and_go(tmp_path: Path) -> None:
    """Of one that is retired under its eyes it gets all, or it goes on to the newer one."""
    make(tmp_path)
    fired, newer = 0, 0
    for at in range(60):
        before = discover(Files(), str(tmp_path)).checkpoints[0].step
        writer = Overtaking(tmp_path, at)
        found, items = read_checkpoint(Files(Watched(writer)), tmp_path)
        assert found.step in (before, before + 1)
        assert same(items["model"]["a"], weights(found.step))
        fired += writer.fired
        newer += found.step > before
    assert fired > 20
    assert 5 < newer < fired


def places(path: Path, files: Files) -> Places:
    """A run's directory, and none beside."""
    return Places(RunDirectory(str(path), files, Keep(), "full"), Cadence(None), company=Alone())


def newest(at: Places) -> choosing.Chosen | None:
    return choosing.newest(at, frozenset())


def of_step(at: Places, step: int | None = None) -> choosing.Chosen:
    return choosing.of_step(at, step, frozenset())


@pytest.mark.parametrize("chosen", [newest, of_step])
def test_a_run_is_put_back_while_checkpoints_come_and_go(
    chosen: Callable[[Places], choosing.Chosen | None], tmp_path: Path
) -> None:
    make(tmp_path)
    newer = 0
    for at in range(30):
        before = discover(Files(), str(tmp_path)).checkpoints[0].step
        files = Files(Watched(Overtaking(tmp_path, at)))
        found = chosen(places(tmp_path, files))
        assert found is not None
        assert found.skipped == ()
        assert found.checkpoint.step in (before, before + 1)
        assert same(found.items["model"]["a"], weights(found.checkpoint.step))
        newer += found.checkpoint.step > before
    assert newer > 5


def test_a_step_that_is_retired_while_it_is_read_is_said_to_be_gone(tmp_path: Path) -> None:
    make(tmp_path)
    files = Files(Watched(Overtaking(tmp_path, 12)))
    with pytest.raises(CheckpointError, match="no usable checkpoint of step 1; there are: 2"):
        of_step(places(tmp_path, files), 1)


def test_a_checkpoint_named_by_its_own_directory_is_not_replaced_by_another(tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(CheckpointFormatError, match="step-00000001"):
        read_checkpoint(Files(Watched(Overtaking(tmp_path, 5))), path)


def test_writers_take_turns(tmp_path: Path) -> None:
    turns: list[int] = []
    refused: list[str] = []
    inside = threading.Semaphore(1)

    def work(writer: int) -> None:
        done = 0
        while done < 8:
            try:
                lock = DirectoryLock(Files(), str(tmp_path))
            except CheckpointError as error:
                refused.append(str(error))
                continue
            try:
                assert inside.acquire(blocking=False), "two writers at once"
                serial = len(discover(Files(), str(tmp_path)).checkpoints) + 1
                make(tmp_path, serial, serial)
                turns.append(writer)
                done += 1
            finally:
                inside.release()
                lock.release()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(turns) == [n for n in range(3) for _ in range(8)]
    assert refused
    assert all("another Checkpointer" in message for message in refused)
    found = discover(Files(), str(tmp_path))
    assert [c.step for c in found.checkpoints] == list(range(24, 0, -1))
    assert not found.skipped
    for checkpoint in found.checkpoints:
        verify_files(Files(), str(checkpoint.path))


def test_the_second_of_two_checkpointers_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with (
        actckpt.Checkpointer(tmp_path, model=model, every=1) as first,
        actckpt.Checkpointer(tmp_path, model=model, every=1) as second,
    ):
        first.step()
        for _ in range(3):
            with pytest.raises(CheckpointError, match="another Checkpointer"):
                second.save()
            first.step()
        assert [c.step for c in first.list()] == [4, 3, 2]
