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
