"""Ctrl-C while `close` waits for slow storage, and the cell is run again: no save is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

import actckpt
from tests.small_run import advance, names, objects
from tests.test_background_saving import LONG_S, Gate

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gate() -> Iterator[Gate]:
    found = Gate()
    yield found
    found.opened.set()


def waits_in_close(frame: FrameType | None) -> bool:
    """Whether a thread waits for an event, and `close` for that."""
    if frame is None or frame.f_code is not threading.Condition.wait.__code__:
        return False
    while frame is not None and frame.f_code is not actckpt.Checkpointer.close.__code__:
        frame = frame.f_back
    return frame is not None


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """Ctrl-C raises, also where a shell has begun this process as one that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_close(run: actckpt.Checkpointer) -> None:
    main = threading.main_thread().ident
    assert main is not None
    given_up = threading.Event()

    def interrupt() -> None:
        while not waits_in_close(sys._current_frames()[main]):
            if given_up.wait(0.01):
                return
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run.close()
    finally:
        given_up.set()
        thread.join()


def join_writers() -> None:
    for thread in threading.enumerate():
        if thread.name == "actckpt-save":
            thread.join()


@pytest.mark.kind("Ctrl-C while close() waits", resumed="exact")
@pytest.mark.parametrize("sets", [1, 2])
def test_the_lock_stays_until_the_writer_has_ended(sets: int, tmp_path: Path, gate: Gate) -> None:
    made = objects()
    run = actckpt.Checkpointer(
        tmp_path, **made, every=1, keep_last=None, staging_sets=sets, files=gate.files
    )
    advance(run, made, sets)
    assert gate.reached.wait(LONG_S)
    interrupted_close(run)
    # the cell once more
    made = objects(seed=1)
    with actckpt.Checkpointer(tmp_path, **made, every=1, keep_last=None) as again:
        with pytest.raises(actckpt.CheckpointError, match="wait until its last save is written"):
            again.resume()
        assert list(tmp_path.glob(".saving*")) == []  # nothing was made, nor deleted
        gate.opened.set()
        join_writers()
        resumed = again.resume()
        assert resumed is not None
        assert resumed.step == sets
        assert len(names(again)) == sets
        advance(again, made, 1)


def test_a_run_that_goes_on_after_all_keeps_the_lock(tmp_path: Path, gate: Gate) -> None:
    made = objects()
    run = actckpt.Checkpointer(tmp_path, **made, every=None, staging_sets=2, files=gate.files)
    advance(run, made, 1)
    run.save(wait=False)
    assert gate.reached.wait(LONG_S)
    interrupted_close(run)
    advance(run, made, 1)
    run.save(wait=False)
    gate.opened.set()
    join_writers()
    with (
        actckpt.Checkpointer(tmp_path, **objects(seed=1)) as other,
        pytest.raises(actckpt.CheckpointError, match="another Checkpointer"),
    ):
        other.resume()
    run.close()
    with actckpt.Checkpointer(tmp_path, **objects(seed=1)) as other:
        assert other.resume() is not None
        assert names(other) == ["step-00000002", "step-00000001"]


def test_an_interpreter_that_ends_says_nothing(tmp_path: Path) -> None:
    code = (
        "import torch, actckpt\n"
        f"run = actckpt.Checkpointer({str(tmp_path)!r}, model=torch.nn.Linear(1, 1))\n"
        "run.save()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
