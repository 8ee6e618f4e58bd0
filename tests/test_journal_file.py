"""A journal on disk: torn, damaged, cut back, printed; and storage that fails or is slow."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import actckpt
from actckpt import cli
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.journal_lines import (
    Again,
    Head,
    Record,
    Saved,
    Step,
    again_line,
    head_line,
    parsed_line,
    saved_line,
    step_line,
)
from actckpt.resuming.journal_pace import MOST, SHARE, WINDOW, Pace
from tests.journal_records import lines, records
from tests.journaled import process, training
from tests.system_calls import Call, Make, Watched, before

STEP = Step("b", 7, ("ab", 2), {"torch": "12"}, {'a "name"\n': "nan", "z": "-0.0"}, ("r", "cd--"))
KINDS: list[tuple[Record, bytes]] = [
    (head := Head("b", 3, {"torch": "2", "device": "Ö"}), head_line(head)),
    (STEP, step_line(STEP)),
    (bare := Step("b", 8, None, {}, {}, None), step_line(bare)),
    (saved := Saved("b", 1, 3), saved_line(saved)),
    (again := Again("b", 4, 5, "step 4: batch"), again_line(again)),
]


@pytest.mark.parametrize(("record", "line"), KINDS)
def test_a_line_says_what_was_written_or_nothing(record: Record, line: bytes) -> None:
    assert line.endswith(b"}\n")
    assert parsed_line(line[:-1]) == record
    for at in range(len(line) - 1):
        assert parsed_line(line[:at]) is None
        damaged = bytearray(line[:-1])
        damaged[at] ^= 4
        assert parsed_line(bytes(damaged)) is None


def test_a_line_of_another_version_says_nothing() -> None:
    body = head_line(Head("b", 3, {}))[:-1].replace(b'"format_version":1', b'"format_version":2')
    text = body.split(b',"checksum"')[0]
    digest = xxhash.xxh3_64_hexdigest(text).encode()
    assert parsed_line(text + b',"checksum":"' + digest + b'"}') is None


def cut(directory: Path, missing: int) -> None:
    path = directory / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-missing])


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    process(tmp_path, 14)
    cut(tmp_path, 9)
    assert process(tmp_path, 16, every=None).verified == (3, None)
    # what was written behind it is whole
    assert process(tmp_path, 16).verified == (6, None)
    assert [parsed_line(line) is None for line in lines(tmp_path)].count(True) == 1


@pytest.mark.kind("a journal that was damaged", resumed="exact")
def test_a_damaged_line_is_no_difference(tmp_path: Path) -> None:
    process(tmp_path, 14)
    path = tmp_path / "journal.jsonl"
    path.write_bytes(
        path.read_bytes().replace(b'"step":12,"batches":["', b'"step":12,"batches":["0')
    )
    assert process(tmp_path, 14).verified == (3, None)


def test_lines_whose_branch_is_not_known_are_not_compared(tmp_path: Path) -> None:
    process(tmp_path, 14)
    path = tmp_path / "journal.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first[:-1] + b"\n" + rest)
    assert process(tmp_path, 14).verified == (0, None)
    assert process(tmp_path, 14).verified == (4, None)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n[]\nnull", os.urandom(5000)])
def test_what_is_no_journal_is_no_difference(content: bytes, tmp_path: Path) -> None:
    process(tmp_path, 14)
    (tmp_path / "journal.jsonl").write_bytes(content)
    assert process(tmp_path, 14).verified == (0, None)
    assert process(tmp_path, 14).verified == (4, None)


class Failing:
    """Calls of one kind on the journal fail from now on; of all others nothing is known."""

    def __init__(self, name: str, code: int) -> None:
        self.name = name
        self.code = code
        self.failed = 0
        self._fds: set[int] = set()

    def __call__(self, call: Call, make: Make) -> Any:
        name = os.path.basename(call.args[0]) if isinstance(call.args[0], str) else ""
        of_journal = "journal.jsonl" in name or call.args[0] in self._fds
        if of_journal and call.name == self.name:
            self.failed += 1
            raise OSError(self.code, os.strerror(self.code))
        result = make(call)
        if call.name == "open":
            (self._fds.add if of_journal else self._fds.discard)(result)
        return result


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("open", errno.EIO),
        ("write", errno.ENOSPC),
        ("readinto", errno.EIO),
        ("lstat", errno.EIO),
        ("rename", errno.ENOSPC),
    ],
)
def test_a_journal_that_fails_stops_nothing(
    name: str, code: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process(tmp_path, 14)
    failing = Failing(name, code)
    again = process(tmp_path, 24, files=Files(Watched(failing)), keep_last=1)
    assert failing.failed
    assert again.resumed is not None
    assert again.verified[1] is None
    writing = [r for r in caplog.records if "cannot be written" in r.message]
    reading = [r for r in caplog.records if "cannot be read" in r.message]
    assert len(writing) <= 1
    assert len(reading) <= 1
    assert writing or reading
    # the next process finds the checkpoint, and what it is told of the steps after it is true
    found = process(tmp_path, 24)
    assert found.resumed is not None
    assert found.resumed.step == 20
    assert found.verified.difference is None
    assert found.verified.steps <= 4  # some or all lines may have come to nothing


def test_after_a_failure_the_next_save_begins_again(tmp_path: Path) -> None:
    full = True

    def refuse(call: Call) -> None:
        if full and call.name == "write" and b'"branch"' in bytes(call.args[1]):
            raise OSError(errno.ENOSPC, "full")

    with training(tmp_path, files=Files(Watched(before(refuse)))) as run:
        for _, batch in run.checkpointer.steps(epochs=None, total_steps=14):
            run.train_on(batch)
            run.update()
            run.checkpointer.step({"loss": 1.0})
            run.checkpointer._places.journal.flush()
            full = run.checkpointer.step_count < 8
    assert [r.step for r in records(tmp_path) if isinstance(r, Step)] == [11, 12, 13, 14]
    assert process(tmp_path, 14).verified.steps == 4


def test_slow_storage_keeps_no_step_waiting(tmp_path: Path) -> None:
    slow, go_on = threading.Event(), threading.Event()

    def wait(call: Call) -> None:
        if call.name == "write" and b'"branch"' in bytes(call.args[1]):
            slow.set()
            assert go_on.wait(60)

    with training(tmp_path, every=None, files=Files(Watched(before(wait)))) as run:
        run.checkpointer.save()
        for step, _ in run.checkpointer.steps(epochs=None, total_steps=30):
            if step == 1:
                assert slow.wait(60)  # the first line is being written, and all others are made
            run.checkpointer.step()
        assert run.checkpointer.step_count == 30
        go_on.set()
    steps = [r.step for r in records(tmp_path) if isinstance(r, Step)]
    assert steps == list(range(1, 31))


def test_no_thread_is_left_behind(tmp_path: Path) -> None:
    process(tmp_path, 14)
    assert "actckpt-journal" not in [thread.name for thread in threading.enumerate()]


def test_the_command_prints_what_was_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process(tmp_path, 14)
    assert cli.main(["checkpoint", "journal", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "step 10: saved as number 2" in out
    assert "9 steps, 6 to 14" in out
    assert "of step 10: a resumed run would make 4 of these steps again" in out
    assert "made again" not in out
    process(tmp_path, 14)
    cut(tmp_path, 3)
    assert cli.main(["checkpoint", "journal", str(tmp_path), "--last", "0"]) == 0
    assert "1 lines are damaged or torn" in capsys.readouterr().out
    process(tmp_path, 14)
    cli.main(["checkpoint", "journal", str(tmp_path)])
    assert "steps 11 to 14, made again: as they were" in capsys.readouterr().out

    def other(run: Any) -> None:
        run.loss = 1.0

    process(tmp_path, 14, after=other)
    assert cli.main(["checkpoint", "journal", str(tmp_path)]) == 1
    assert "made again: step 11: metric loss was " in capsys.readouterr().out
    assert cli.main(["checkpoint", "journal", str(tmp_path / "nowhere")]) == 2
    for command in (["ls"], ["verify"], ["show"], ["prune"]):
        assert cli.main(["checkpoint", *command, str(tmp_path)]) == 0
        assert "journal" not in capsys.readouterr().out


def test_steps_that_are_too_short_are_taken_down_in_part(tmp_path: Path) -> None:
    now = {"loop": 0.0, "own": 0.0}
    pace = Pace(lambda: now["loop"], lambda: now["own"])

    def window(step_s: float, own_s: float) -> int:
        for step in range(WINDOW):
            now["loop"] += step_s
            if pace.takes(step):
                begin = pace.now()
                now["own"] += own_s
                pace.spent(begin)
            pace.stepped()
        return pace.every

    assert window(1.0, 0.9 * SHARE) == 1
    assert window(1e-3, 9e-3 * SHARE) == 16
    assert window(1e-3, 9e-3 * SHARE) == 16
    assert window(1.0, 0.9 * SHARE) == 8
    assert window(1e-9, 1.0) == MOST
    # what is compared are the steps that were taken down
    with training(tmp_path) as run:
        run.checkpointer._journal._pace.every = 4
        for _, batch in run.checkpointer.steps(epochs=None, total_steps=13):
            run.train_on(batch)
            run.update()
            run.checkpointer.step({"loss": 0.5})
    assert [r.step for r in records(tmp_path) if isinstance(r, Step)] == [8, 12]
    with training(tmp_path) as run:
        run.checkpointer.resume()
        for _, batch in run.checkpointer.steps(epochs=None, total_steps=13):
            run.train_on(batch)
            run.update()
            run.checkpointer.step({"loss": 0.5})
        assert run.checkpointer.verified == (1, None)


def test_closing_twice_and_going_on(tmp_path: Path) -> None:
    with training(tmp_path) as run:
        for _ in run.checkpointer.steps(epochs=None, total_steps=7):
            run.checkpointer.step()
        run.checkpointer.close()
        run.checkpointer.close()
        run.checkpointer.save()
        for _ in run.checkpointer.steps(epochs=None, total_steps=9):
            run.checkpointer.step()
    assert [r.step for r in records(tmp_path) if isinstance(r, Step)] == [6, 7, 8, 9]
    assert process(tmp_path, 9).verified.steps == 1
    assert issubclass(actckpt.CheckpointDifferenceError, actckpt.CheckpointError)


def test_a_forked_child_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with training(tmp_path) as run, caplog.at_level(logging.WARNING):
        for _ in run.checkpointer.steps(epochs=None, total_steps=7):
            run.checkpointer.step()
        run.checkpointer._places.journal.close()  # a fork beside threads is warned of
        child = os.fork()
        if not child:
            try:
                run.checkpointer._journal.stepped(8, None, {})
                run.checkpointer._places.journal.flush()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    assert [r.step for r in records(tmp_path) if isinstance(r, Step)] == [6, 7]


def test_weights_that_cannot_be_read_stop_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    process(tmp_path, 12)

    def fails(*_: Any) -> None:
        raise NotImplementedError("a tensor of its own kind")

    monkeypatch.setattr("actckpt.resuming.weight_sample.WeightSampler.sample", fails)
    assert process(tmp_path, 14).verified == (2, None)
    (said,) = [r for r in caplog.records if "cannot read this run" in r.message]
    assert "a tensor of its own kind" in said.message


def test_a_model_without_weights(tmp_path: Path) -> None:
    for expected in (0, 3):
        with actckpt.Checkpointer(
            tmp_path, model=torch.nn.ReLU(), every=5, background=False
        ) as run:
            run.resume()
            for _ in run.steps([1, 2, 3], epochs=None, total_steps=8):
                run.step({"loss": 1.0})
            assert run.verified == (expected, None)
