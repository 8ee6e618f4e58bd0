"""How a process ends while it saves: finished or abandoned, never half a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import actckpt
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.verification import verify_files
from tests.small_run import advance, names, objects

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _handler_as_before() -> Iterator[None]:
    # other tests of this process drop runs without closing them
    outer = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGTERM, outer)


def terminate() -> None:
    """SIGTERM to this process, seen by Python before this returns."""
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("every", [None, 1])
def test_sigterm_saves_after_the_step_and_ends_the_process(
    every: int | None, tmp_path: Path
) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=every) as run:
        advance(run, made, 1)
        terminate()
        with pytest.raises(SystemExit) as ended:
            advance(run, made, 1)
        assert ended.value.code == 143
        assert names(run)[0] == "step-00000002"


def test_sigterm_in_the_middle_of_accumulation(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, loader=[1, 2, 3]) as run:
        batches = run.steps()
        next(batches)
        terminate()
        with pytest.raises(SystemExit):
            next(batches)
        assert run.list()[0].step == 0
    with actckpt.Checkpointer(tmp_path, **objects(), loader=[1, 2, 3]) as run:
        assert run.resume() is not None
        assert [batch for _, batch in run.steps()] == [2, 3]


def test_an_earlier_handler_gets_the_signal_once_all_is_saved(tmp_path: Path) -> None:
    came = []

    def handler(number: int, frame: FrameType | None) -> None:
        came.append(names(run))

    before = signal.signal(signal.SIGTERM, handler)
    try:
        made = objects()
        with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
            advance(run, made, 1)
            terminate()
            assert came == []
            advance(run, made, 1)
            assert came == [["step-00000002"]]
            advance(run, made, 1)  # the handler did not end the process
            assert signal.getsignal(signal.SIGTERM) != handler
        assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_after_the_last_step_saves_at_the_end(tmp_path: Path) -> None:
    made = objects()
    run = actckpt.Checkpointer(tmp_path, **made, every=None)
    advance(run, made, 2)
    terminate()
    with pytest.raises(SystemExit) as ended:
        run.close()
    assert ended.value.code == 143
    assert names(run) == ["step-00000002"]
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
            run.resume()
            advance(run, made, 1)
            terminate()
            assert came == []
        assert came == [signal.SIGTERM]
        assert names(run)[0] == "step-00000003"

        def fails() -> None:
            with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
                run.resume()
                run.step()
                terminate()
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            fails()
        assert names(run)[0] == "step-00000003"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_that_was_dropped_leaves_nothing_behind(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    made = objects()
    dropped = actckpt.Checkpointer(tmp_path, **made)
    dropped.step()  # and begins a save
    dropped.list()  # which has ended
    del dropped
    with actckpt.Checkpointer(tmp_path, **made, every=None, fresh=True) as run:
        advance(run, made, 1)
        terminate()
        with pytest.raises(SystemExit):
            advance(run, made, 1)
        assert run.list()[0].step == 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_signals_are_left_alone_where_nobody_asked(tmp_path: Path) -> None:
    made = objects()
    before = signal.getsignal(signal.SIGTERM)
    with actckpt.Checkpointer(tmp_path, **made, on_sigterm=None) as run:
        advance(run, made, 1)
        assert signal.getsignal(signal.SIGTERM) == before
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with actckpt.Checkpointer(tmp_path, **made) as run:
            run.resume()
            advance(run, made, 1)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, ignored)
    with pytest.raises(ValueError, match="on_sigterm must be"):
        actckpt.Checkpointer(tmp_path, **made, on_sigterm="stop")


@pytest.mark.parametrize("how", ["child", "again", "forgotten"])
def test_a_signal_that_is_not_ours_to_keep(how: str, tmp_path: Path) -> None:
    made = objects()
    run: Any = actckpt.Checkpointer(tmp_path, **made)
    advance(run, made, 1)
    child = os.fork()
    if child == 0:
        if how != "child":  # the child's own run
            run = actckpt.Checkpointer(tmp_path / "own", **made)
            run.step()
        if how == "again":
            terminate()
        if how == "forgotten":
            run = None
        terminate()
        os._exit(0)
    run.close()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def program(directory: Path, body: str) -> subprocess.Popen[str]:
    """A process that trains 1 MB in a loop and says when a save has begun."""
    text = f"""
    import signal, sys, time, torch, actckpt
    from actckpt.checkpoint.files import Files
    from tests.system_calls import Watched, before

    def slow(call):
        if call.name == "write":
            print("writing", flush=True)
            time.sleep(0.02)

    # whom a shell starts in the background, inherits that it is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = torch.nn.Linear(500, 500)
    run = actckpt.Checkpointer(
        {str(directory)!r}, model=model, every=1, files=Files(Watched(before(slow))), keep_last=None
    )
    """
    code = textwrap.dedent(text) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_exit_ctrl_c_and_sigterm_while_a_save_is_written(tmp_path: Path) -> None:
    loop = "while True:\n    run.step()\n    time.sleep(0.001)\n"
    bodies = {
        "exit": "run.step()",
        "error": "run.step()\nraise KeyError",
        "ctrl-c": f"with run:\n{textwrap.indent(loop, '    ')}",
        "sigterm": loop,
        "killed": loop,
    }
    status = {"exit": 0, "error": 1, "ctrl-c": -signal.SIGINT, "sigterm": 143, "killed": -9}
    sent = {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM, "killed": signal.SIGKILL}
    # together: each of them mostly waits for its imports
    running = {how: program(tmp_path / how, body) for how, body in bodies.items()}
    try:
        for how, process in running.items():
            assert process.stdout is not None
            if how in sent:
                for _ in range(8):  # into the second save, or further
                    assert process.stdout.readline() == "writing\n"
                process.send_signal(sent[how])
            _, errors = process.communicate(timeout=300)
            assert process.returncode == status[how], errors
            found = sorted({*os.listdir(tmp_path / how)} - {"journal.jsonl"})
            steps = [name for name in found if name.startswith("step-")]
            assert steps, how
            assert (len(found) > len(steps) + 1) <= (how == "killed"), found
            for name in steps:
                verify_files(Files(), str(tmp_path / how / name))
    finally:
        for process in running.values():
            with process:
                process.kill()
