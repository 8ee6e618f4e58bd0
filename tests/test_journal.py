"""Steps that a resumed run makes again are compared with the journal of the process before."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import actckpt
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.journal_lines import Head, Saved, Step
from tests.journal_records import records
from tests.journaled import Training, process, training
from tests.system_calls import Call, Watched
from tests.system_calls import before as watch

ROOT = Path(__file__).parent.parent
AT = 12  # in the middle of the steps that are made again


@pytest.mark.kind("steps after the last checkpoint, made again", resumed="exact")
def test_steps_made_again_are_seen_to_come_out_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert process(tmp_path, 14).verified == (0, None)
    with caplog.at_level(logging.INFO, "actckpt"):
        again = process(tmp_path, 14)
    assert again.resumed is not None
    assert again.resumed.step == 10
    assert again.verified == (4, None)
    assert [r.message for r in caplog.records if "made again" in r.message] == [
        "actckpt: steps 11 to 14, made again, came out as they were (4 compared: batches, random "
        "states, metrics, sampled weights)"
    ]
    # what was seen twice is not kept twice; a third process compares it as well
    assert process(tmp_path, 12).verified == (2, None)
    assert process(tmp_path, 19).verified == (4, None)
    assert process(tmp_path, 16).verified == (1, None)
    steps = [r.step for r in records(tmp_path) if isinstance(r, Step)]
    assert steps == sorted({*steps})


class ForkSeeded:
    """Keeps a generator's state as a tensor, and forks the global stream for each call."""

    def __init__(self) -> None:
        self.state = torch.Generator().manual_seed(7).get_state()

    def __call__(self, run: Training) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.set_rng_state(self.state)
            loss = run.forward()
            self.state = torch.get_rng_state()
            return loss


@pytest.mark.kind("a random state that nobody can see", resumed="said no")
def test_masks_drawn_from_a_state_that_nobody_passed(tmp_path: Path) -> None:
    first = process(tmp_path, 14, forward=ForkSeeded())
    again = process(tmp_path, 14, forward=ForkSeeded())
    assert again.losses[11] != first.losses[11]
    assert again.verified.steps == 1
    assert again.verified.difference is not None
    assert again.verified.difference.step == 11
    assert "metric loss" in again.verified.difference.differs
    assert any(what.startswith("weights of ") for what in again.verified.difference.differs)


def last_bit(run: Training) -> None:
    if run.step == AT:
        with torch.no_grad():
            run.model[2].get_parameter("weight").view(torch.int32)[0, 31] ^= 1


def metric(run: Training) -> None:
    if run.step == AT:
        run.loss = float(np.nextafter(run.loss, 1e9))


def draw_torch(run: Training) -> None:
    if run.step == AT:
        torch.rand(1)


def draw_numpy(run: Training) -> None:
    if run.step == AT:
        np.random.random()


def draw_python(run: Training) -> None:
    if run.step == AT:
        random.random()


@pytest.mark.parametrize(
    ("plant", "differs"),
    [
        (last_bit, "weights of 2.weight"),
        (metric, "metric loss"),
        (draw_torch, "random state torch"),
        (draw_numpy, "random state numpy"),
        (draw_python, "random state python"),
    ],
)
@pytest.mark.kind("what differs of a step made again is named", resumed="said no")
def test_what_differs_is_named_and_nothing_else(
    plant: Callable[[Training], None],
    differs: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = process(tmp_path, 14)
    again = process(tmp_path, 14, after=plant)
    difference = again.verified.difference
    assert difference is not None
    assert (difference.step, difference.differs) == (AT, (differs,))
    assert again.losses[AT] == first.losses[AT]
    (said,) = [r for r in caplog.records if "made again" in r.message]
    assert said.levelno == logging.WARNING
    assert f"step {AT}: " in said.message
    # a metric may be a time; all else goes on to be compared
    assert again.verified.steps == (4 if plant is metric else 2)


@pytest.mark.kind("a batch that is another one", resumed="said no")
def test_a_batch_swapped_is_named(tmp_path: Path) -> None:
    read: dict[int, torch.Tensor] = {}

    def look(run: Training) -> None:
        read[run.step] = run.batch[0].clone()

    def swap(data: torch.Tensor) -> None:
        """With a sample of a later batch."""
        here = int((data == read[AT][0]).all(1).nonzero())
        there = int((data == read[AT + 3][0]).all(1).nonzero())
        data[[here, there]] = data[[there, here]]

    process(tmp_path, 16, before=look, every=10)
    again = process(tmp_path, 16, data=swap)
    assert again.verified.steps == 2
    assert again.verified.difference is not None
    assert again.verified.difference.step == AT
    assert again.verified.difference.differs[0] == "batch"
    assert "random state" not in str(again.verified.difference)


@pytest.mark.kind("steps of several batches, saved between two of them", resumed="exact")
def test_steps_of_several_batches(tmp_path: Path) -> None:
    def train(batches: int, save_at: int = 0) -> actckpt.Checkpointer:
        with training(tmp_path, every=None) as run:
            if run.checkpointer.resume() is None:
                run.checkpointer.save()
            for number, (_, batch) in enumerate(run.checkpointer.steps(epochs=None), 1):
                run.train_on(batch)
                if run.checkpointer._progress.batches.count == 3:
                    run.update()
                    run.checkpointer.step()
                if number == save_at:
                    run.checkpointer.save()
                if number == batches:
                    break
            return run.checkpointer

    train(13, save_at=7)
    steps = {r.step: r.batches for r in records(tmp_path) if isinstance(r, Step)}
    assert [(step, found and found[1]) for step, found in steps.items()] == [
        (n, 3) for n in (1, 2, 3, 4)
    ]
    assert train(6).verified == (2, None)


def test_a_difference_can_be_raised_and_nothing_is_saved_of_it(tmp_path: Path) -> None:
    process(tmp_path, 14)
    for _ in range(2):  # what is expected stays
        with pytest.raises(actckpt.CheckpointDifferenceError, match=f"step {AT}: ") as raised:
            process(tmp_path, 20, after=draw_torch, on_difference="raise")
        assert (raised.value.step, raised.value.differs) == (AT, ("random state torch",))
    again = process(tmp_path, 14, on_difference="raise")
    assert again.resumed is not None
    assert again.resumed.step == 10
    assert again.verified == (4, None)


def test_who_goes_on_after_a_difference_is_another_branch(tmp_path: Path) -> None:
    process(tmp_path, 14)
    assert process(tmp_path, 14, after=draw_torch).verified.steps == 2
    # the next process is compared with the last, not with the first
    assert process(tmp_path, 14, after=draw_torch).verified == (4, None)
    assert process(tmp_path, 14).verified.difference is not None


def test_who_catches_a_difference_and_saves_is_another_branch(tmp_path: Path) -> None:
    process(tmp_path, 14)
    with training(tmp_path, on_difference="raise") as run:
        run.checkpointer.resume()
        for _, batch in run.checkpointer.steps(epochs=None, total_steps=18):
            run.train_on(batch)
            run.update()
            if run.checkpointer.step_count == 10:
                with pytest.raises(actckpt.CheckpointDifferenceError, match="step 11"):
                    run.checkpointer.step({"loss": 0.0})
            else:
                run.checkpointer.step()
    heads = [r.after for r in records(tmp_path) if isinstance(r, Head)]
    assert heads == [5, 15]


PROGRAM = """
import sys, time, pathlib, torch
torch.set_num_threads(int(sys.argv[2]))
from tests.journaled import process
def tell(run):
    if run.step == 13:
        print("made 13", flush=True)
        time.sleep(60)
process(pathlib.Path(sys.argv[1]), 99, before=tell)
"""


@pytest.mark.kind("killed some steps after the last checkpoint", resumed="exact")
def test_what_a_kill_leaves_is_what_was_made(tmp_path: Path) -> None:
    # steps of another number of threads are not compared
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path), str(torch.get_num_threads())]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "made 13\n"
        time.sleep(1.0)  # lines are with the system after a fiftieth of that
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    again = process(tmp_path, 20)
    assert again.resumed is not None
    assert again.resumed.step == 10
    assert again.verified == (2, None)


def test_the_journal_is_cut_back_with_the_checkpoints(tmp_path: Path) -> None:
    process(tmp_path, 43, keep_last=2)
    found = records(tmp_path)
    assert [r.step for r in found if isinstance(r, Step)] == [36, 37, 38, 39, 40, 41, 42, 43]
    assert [r.step for r in found if isinstance(r, Saved)] == [35, 40]
    assert process(tmp_path, 43, keep_last=2).verified == (3, None)


def test_after_restore_nothing_is_compared_nor_mixed(tmp_path: Path) -> None:
    process(tmp_path, 14, keep_last=None)
    with training(tmp_path, every=None) as run:
        run.checkpointer.restore(5)
        run.checkpointer.save(tag="other")
        for _, batch in run.checkpointer.steps(epochs=None, total_steps=8):
            run.train_on(batch)
            run.update()
            run.checkpointer.step({"loss": 1.0})
        assert run.checkpointer.verified == (0, None)
    # the newest is the one that was saved last, and what was made after it
    again = process(tmp_path, 14, keep_last=None, every=None)
    assert again.resumed is not None
    assert again.resumed.step == 5
    assert again.verified.difference is not None  # other losses were reported
    assert again.verified.difference.differs == ("metric loss",)
    assert again.verified.steps == 3


def test_a_branch_that_was_left_is_compared_with_itself_alone(tmp_path: Path) -> None:
    process(tmp_path, 14, keep_last=None)
    with training(tmp_path, every=None) as run:
        run.checkpointer.resume()
        run.checkpointer.restore(5)
        for _ in run.checkpointer.steps(epochs=None, total_steps=8):
            run.checkpointer.step({"loss": 1.0})
        assert run.checkpointer.verified == (0, None)
    # nothing was saved there: the newest checkpoint is of the old branch
    again = process(tmp_path, 14, keep_last=None)
    assert again.resumed is not None
    assert again.resumed.step == 10
    assert again.verified == (4, None)
    assert process(tmp_path, 17).verified == (4, None)
    assert process(tmp_path, 17).verified == (2, None)


@pytest.mark.kind("steps made again with another torch", resumed="said no")
def test_another_torch_compares_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process(tmp_path, 14)
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    again = process(tmp_path, 13)
    assert again.verified == (0, None)
    assert again.resumed is not None
    (note,) = again.resumed.notes
    assert note.startswith("the 4 steps that were made after it are not compared")
    assert "is 2.99.0" in note
    assert process(tmp_path, 13).verified == (3, None)  # with that one's own


def test_no_journal_where_nobody_wants_one(tmp_path: Path) -> None:
    process(tmp_path, 14, on_difference=None)
    assert not (tmp_path / "journal.jsonl").exists()
    assert process(tmp_path, 14, on_difference=None).verified == (0, None)
    with pytest.raises(ValueError, match="on_difference must be"):
        process(tmp_path, 14, on_difference="stop")


def test_a_directory_that_cannot_be_written_is_compared_with(tmp_path: Path) -> None:
    process(tmp_path, 14)
    before = (tmp_path / "journal.jsonl").read_bytes()

    def refuse(call: Call) -> None:
        if call.name == "open" and call.args[1] & (os.O_CREAT | os.O_WRONLY):
            raise OSError(errno.EROFS, "read-only")

    again = process(tmp_path, 13, every=None, files=Files(Watched(watch(refuse))))
    assert again.verified == (3, None)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_another_run_does_not_go_on_in_an_old_journal(tmp_path: Path) -> None:
    process(tmp_path, 14)
    process(tmp_path, 7, fresh=True)
    (aside,) = tmp_path.glob("set-aside-*")
    assert process(aside, 14).verified == (4, None)
    found = records(tmp_path)
    assert [r.after for r in found if isinstance(r, Head)] == [5]
    assert [r.step for r in found if isinstance(r, Step)] == [6, 7]


@pytest.mark.kind("a loop of the user's own, made again", resumed="exact")
def test_steps_of_a_loop_of_the_users_own(tmp_path: Path) -> None:
    def train(until: int) -> actckpt.Checkpointer:
        with training(tmp_path) as run:
            loader = run.checkpointer.loader
            assert loader is not None
            run.checkpointer.resume()
            while run.checkpointer.step_count < until:
                for batch in loader:
                    run.train_on(batch)
                    run.update()
                    run.checkpointer.step({"loss": 1.0})
                    if run.checkpointer.step_count == until:
                        break
            return run.checkpointer

    train(14)
    steps = [r for r in records(tmp_path) if isinstance(r, Step)]
    assert [r.batches and r.batches[1] for r in steps] == [1] * 9
    assert train(14).verified == (4, None)
