"""Ranks that make different calls, or save at different steps: each is told at once what each did.

Ranks are threads here; none of them waits for its patience to end.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from actckpt.checkpoint.discovery import Checkpoint, discover
from actckpt.checkpoint.encoding import encode
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.errors import CheckpointSaveError
from actckpt.sharded.calls import RanksApartError
from actckpt.sharded.committing import decline
from actckpt.sharded.exchange import Exchange
from actckpt.sharded.known import Known
from actckpt.sharded.whereabouts import CALL, SAVE, Place, Whereabouts
from tests.threaded_ranks import exchanges, on_every_rank, part_of_save


def decided(exchange: Exchange, call: str, found: Any) -> Any:
    """What the first rank finds, on every rank that asks."""
    calls = exchange.calls
    if not exchange.is_coordinator:
        return calls.hear(call)
    calls.tell(calls.question(call), found)
    return found


def save(exchange: Exchange, directory: Path, step: int, known: Known | None = None) -> Checkpoint:
    """One rank's part of a save."""
    state = {"weight": torch.full((3,), float(step))}
    snapshot = Snapshot(step, {"model": encode(state, "model")}, "", {}, "", {})
    return part_of_save(exchange, directory, snapshot, Files(), step, known)


def test_what_the_first_rank_decides_alone_is_no_answer_to_others() -> None:
    with exchanges(3) as ranks:

        def act(rank: int) -> Any:
            exchange = ranks[rank]
            if not rank:
                decided(exchange, "pin(5)", "pinned")
            found = decided(exchange, "resume()", "step 7")
            return found, exchange.calls.gather("resume()", rank)

        assert on_every_rank(3, act) == [("step 7", [0, 1, 2])] * 3


def test_different_calls_are_named_on_every_rank_and_the_next_are_in_step() -> None:
    with exchanges(3) as ranks:

        def act(rank: int) -> Any:
            exchange, said = ranks[rank], ""
            try:
                if rank == 1:
                    decided(exchange, "restore(3)", None)
                decided(exchange, "resume()", "step 7")
                exchange.calls.gather("resume()", rank)
            except RanksApartError as error:
                said = str(error)
            # as if nothing had been said before
            found = decided(exchange, "resume()", "step 8")
            return said, found, exchange.calls.gather("resume()", rank)

        for found in on_every_rank(3, act):
            said, again, gathered = found  # type: ignore[misc]
            assert "rank 0 is in resume() and rank 1 is in restore(3)" in said
            assert again == "step 8"
            assert gathered == [0, 1, 2]


def test_ranks_at_different_places_of_one_call_do_not_wait() -> None:
    """As after a call that Ctrl-C has ended on one of them."""
    with exchanges(2) as ranks:

        def act(rank: int) -> str:
            calls = ranks[rank].calls
            try:
                return str(calls.hear("resume()") if rank else calls.gather("resume()", 0))
            except RanksApartError as error:
                return str(error)

        for said in on_every_rank(2, act):
            assert "rank 0 is in resume() and rank 1 is in resume()" in str(said)


def test_saves_at_different_steps_fail_at_once_and_both_steps_are_named(tmp_path: Path) -> None:
    known = [Known() for _ in range(3)]
    with exchanges(3) as ranks:

        def act(rank: int) -> Any:
            said = []
            for step in (1, 3 if rank == 1 else 2, 4):
                try:
                    said.append(save(ranks[rank], tmp_path, step, known[rank]).step)
                except CheckpointSaveError as error:
                    said.append(str(error))  # type: ignore[arg-type]
            return said

        for found in on_every_rank(3, act):
            first, text, last = found  # type: ignore[misc]
            assert (first, last) == (1, 4)
            assert "rank 0 is in a save of step 2 and rank 1 is in a save of step 3" in text
        # who comes to a save that was given up is told so
        text = str(on_every_rank(3, lambda rank: save(ranks[rank], tmp_path, 3))[0])
        assert "rank 1 is in a save of step 3" in text
        found = discover(Files(), str(tmp_path))
        assert [c.step for c in found.checkpoints] == [4, 1]
        for checkpoint in found.checkpoints:
            checkpoint.verify()


def test_a_save_of_one_rank_fails_once_the_first_is_in_a_call(tmp_path: Path) -> None:
    with exchanges(2) as ranks:

        def act(rank: int) -> Any:
            said = ""
            try:
                if rank:
                    save(ranks[rank], tmp_path, 1)
            except CheckpointSaveError as error:
                said = str(error)
            return said, ranks[rank].calls.gather("resume()", rank)

        first, second = on_every_rank(2, act)
        assert first == ("", [0, 1])
        said, gathered = second  # type: ignore[misc]
        assert "rank 0 is in resume() and rank 1 is in a save of step 1" in said
        assert gathered == [0, 1]


def test_a_save_fails_once_another_rank_is_in_a_call_instead(tmp_path: Path) -> None:
    with exchanges(2) as ranks:

        def act(rank: int) -> Any:
            said = ""
            try:
                if rank:
                    ranks[rank].calls.gather("resume()", rank)
                else:
                    save(ranks[rank], tmp_path, 1)
            except (CheckpointSaveError, RanksApartError) as error:
                said = str(error)
            return said

        for said in on_every_rank(2, act):
            assert "rank 0 is in a save of step 1 and rank 1 is in resume()" in str(said)
    assert discover(Files(), str(tmp_path)).checkpoints == ()


def test_who_is_slow_to_hear_that_it_may_leave_is_not_met_there_again(tmp_path: Path) -> None:
    """Where a rank said it was it is until it has heard; meanwhile others go on."""
    with exchanges(2) as ranks:
        slow = Whereabouts(ranks[1])
        slow.say(SAVE, Place("save/1.0/plan/0/of/1", "a save of step 1", (0,), "save/1.0"))
        decline(ranks[0], "save/1.0", RuntimeError("no memory"))
        slow.say(CALL, Place("met/0/pin(3)/1", "pin(3)", (0,)))
        ranks[0].tell("apart/0", "rank 0 is in a save of step 1 and rank 1 is in pin(3)")

        def act(rank: int) -> int:
            if rank:
                time.sleep(1.5)  # rank 0 looks where it is
            return save(ranks[rank], tmp_path, 2).step

        assert on_every_rank(2, act) == [2, 2]
