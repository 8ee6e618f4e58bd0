"""One rank fails, or does what the others do not: all say the same of it, and the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranked import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What both ranks found, by scenario; starting them takes longer than all that they do."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    return launch(folder, "tests.ranked_faults", "all", 2)


def test_a_rank_that_saves_alone_costs_one_save(ranks: list[Any]) -> None:
    first, second = (rank["saves_apart"] for rank in ranks)
    assert "did not come within 6 s" in first["alone"]
    for rank in (first, second):
        assert rank["lone"][1:] == [[4, "committed"]] * 2 + [[6, "committed"]]
        # what the first rank finds, all do
        assert rank["better"] == [4, "committed"]
        assert rank["function"] == [2, "committed"]
        assert rank["lone steps"] == [2, 4, 6]
        assert rank["better steps"] == [1, 2, 4]
        assert rank["function steps"] == [2]


@pytest.mark.parametrize(
    "where",
    [
        "copy",
        "copy of the first",
        "staging",
        "staging of the first",
        "listing",
        "share",
        "share of the first",
    ],
)
def test_what_fails_on_one_rank_fails_on_all_at_once(ranks: list[Any], where: str) -> None:
    for rank in ranks:
        assert rank["one_fails"][where] == [[2, "failed"], False, [3, "committed"], [1, 3]]


def test_what_is_under_its_name_has_not_failed(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["one_fails"]["read back"] == [
            [2, "unknown"],
            False,
            [3, "committed"],
            [1, 2, 3],
        ]
        assert rank["told_late"]["untold"] == [1, "committed"]


def test_a_verdict_is_kept_until_every_rank_has_heard_it(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["told_late"]["late"] == [[2, "failed"], False]
        assert rank["told_late"]["made"] == [1]
        assert rank["told_late"]["steps"] == [1, 1]


def test_what_one_rank_cannot_read_now_is_not_passed_over(ranks: list[Any]) -> None:
    for rank in ranks:
        kind, text = rank["unreadable"]["error"]
        assert kind == "CheckpointError"
        assert "timed out" in text
        assert rank["unreadable"]["then"] == 2
        assert rank["unreadable"]["said"]


def test_one_sigterm_ends_one_step(ranks: list[Any]) -> None:
    first, second = (rank["asked_to_end"] for rank in ranks)
    assert first == second
    assert len(first["passed"]) == 2
    assert first["passed"] == first["steps"]


def test_each_rank_has_its_own_of_what_is_no_part_of_a_model(ranks: list[Any]) -> None:
    first, second = (rank["own_items"] for rank in ranks)
    assert first["step"] == second["step"] == 1
    assert first["data"] == {"both": {"a": 1, "seen": {"x": 1}}, "alone": {"first": True}}
    assert second["data"] == {"both": {"seen": {"y": 2}}, "mine": {"second": True}}
    # in another world a process has that of one, and it is said
    alone = ranks[0]["without_others"]
    assert alone["data"] == first["data"]
    assert any(
        "ranks had extra-alone (and 2 more) each otherwise" in reason for reason in alone["inexact"]
    )


def test_what_was_said_in_a_run_before_is_not_heard(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["started_again"] == {
            "at 0": 2,
            "saved 0": [3, "committed"],
            "at 1": 3,
            "saved 1": [4, "committed"],
        }


@pytest.mark.parametrize("victim", [1, 0])
@pytest.mark.parametrize("what", ["full", "read-only"])
def test_the_disk_of_one_rank_costs_one_save(ranks: list[Any], what: str, victim: int) -> None:
    reasons = {"full": "No space left on device", "read-only": "Read-only file system"}
    name = what if victim else f"{what} of the first"
    for rank in ranks:
        failed, reason, then, made, there = rank["disks"][name]
        assert failed == [2, "failed"]
        assert reasons[what] in reason
        assert "step 2 could not be saved" in reason
        assert ("rank 1: " in reason) == bool(victim)
        assert then == [3, "committed"]
        assert made == 3
        assert there == [1, 3]


def test_a_rank_that_is_stopped_in_a_save_comes_back_to_the_next(ranks: list[Any]) -> None:
    first, second = (rank["stopped"] for rank in ranks)
    assert first["steps"] == second["steps"]
    for rank in (first, second):
        step, verdict, reason = rank["during"]
        assert verdict == "failed"
        assert step not in rank["steps"]
        assert "was not heard of for 2 s: it was killed or stopped" in reason
        assert rank["first"][1] == rank["last"][1] == "committed"
        assert {rank["first"][0], rank["last"][0]} <= {*rank["steps"]}


def test_a_call_of_one_rank_alone_is_no_answer_to_another(ranks: list[Any]) -> None:
    for rank in (rank["in_other_calls"] for rank in ranks):
        assert rank["restored"] == rank["again"] == 2
        assert rank["pinned"] == ["00000001", "00000002"]
        assert "rank 0 is in resume() and rank 1 is in restore(1)" in rank["apart"]
        # of steps 2, 4, 6 and 3, 6 the last comes too late: rank 0 has given it up
        step, verdict, reason = rank["saved"]
        assert (step, verdict) == (6, "failed")
        assert "rank 0 is in a save of step 4 and rank 1 is in a save of step 6" in reason
        assert rank["then"] == 6


MISTAKES = {
    "no files of rank 1": "rank-00001.json cannot be read: [Errno 2]",
    "share of another save": "rank-00001.json is damaged",
    "vouched for": "of another save; files of different checkpoints may have been mixed",
    "newer root": "has manifest format version 99; this actckpt reads version 1 and 2 and 3",
    "newer share": "rank-00001.json has rank format version 99",
    "older share": "rank-00001.json has rank format version 0",
    "foreign": "manifest.json cannot be read: [Errno 2]",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_wrong_with_a_folder_every_rank_says(ranks: list[Any], mistake: str) -> None:
    first, second = (rank["folders"] for rank in ranks)
    newer, both = first[f"{mistake} newer"], first[f"{mistake} both"]
    assert second[f"{mistake} newer"] == newer
    assert second[f"{mistake} both"] == both
    # the older one is taken, or nothing is, and nothing has changed
    step, reason = newer
    assert step == 1
    assert "step-00000002" in reason
    assert MISTAKES[mistake] in reason
    kind, text, untouched = both
    assert kind == "CheckpointError"
    assert "has 2 checkpoints and none can be used" in text
    assert text.count(MISTAKES[mistake]) == 2
    assert untouched


def test_ranks_of_another_directory_or_model_are_refused_on_all(ranks: list[Any]) -> None:
    for rank in (rank["folders"] for rank in ranks):
        for name, kind, text in (
            ("another run", "CheckpointError", "it is another checkpoint on rank 1 than on rank 0"),
            ("no such run", "CheckpointError", "/none/step-00000002 is not there"),
            ("another model", "CheckpointMismatchError", "does not fit this model"),
        ):
            found, said, untouched = rank[name]
            assert found == kind
            assert text in said
            assert untouched
        step, verdict, reason = rank["saved apart"]
        assert (step, verdict) == (1, "failed")
        assert "every rank has to be given the same directory" in reason
        assert "rank 1: " in reason
