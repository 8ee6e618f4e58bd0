"""Faster folders of many ranks, one on each node: what they are gone on from when some is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actckpt.cli import main
from tests.ranked import launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiers")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Any]:
    """What three ranks on two nodes found; starting them takes longer than all that they do."""
    return launch(folder, "tests.tiered_by_ranks", "tiered", 3)


def test_every_node_has_its_own_files_and_a_copy_of_the_one_before(ranks: list[Any]) -> None:
    for rank, found in enumerate(ranks):
        assert found["list"] == [[4, f"node-{rank // 2}"], [3, "run"]]
        assert found["last"] == [4, "committed"]


@pytest.mark.parametrize("lost", ["killed", "a node lost", "the other lost", "turned on one"])
def test_it_goes_on_to_the_last_bit_from_what_the_nodes_have(lost: str, ranks: list[Any]) -> None:
    for rank, found in enumerate(ranks):
        assert found[lost]["step"] == 4
        assert found[lost]["at"] == f"node-{rank // 2}"
        assert not found[lost]["skipped"]
        assert found[lost]["state"] == found["fourth"]


def test_a_node_brings_no_more_than_its_ranks_read(ranks: list[Any]) -> None:
    whole = ranks[0]["killed"]["files"]
    assert ranks[0]["a node lost"]["files"] < whole
    assert ranks[2]["the other lost"]["files"] < ranks[0]["a node lost"]["files"]


def test_any_world_reads_them(ranks: list[Any]) -> None:
    for found in ranks[:2]:
        assert found["two ranks"]["step"] == 4
        again, whole = found["two ranks"]["state"], found["fourth"]
        assert {k: v for k, v in again.items() if k != "drawn"} == {
            k: v for k, v in whole.items() if k != "drawn"
        }


def test_what_no_node_has_is_read_from_the_directory_or_the_store(ranks: list[Any]) -> None:
    for found in ranks:
        damaged, lost = found["turned on both"], found["all lost"]
        assert damaged["skipped"] == ["the files of rank 1 are on no node"]
        for back in (damaged, lost):
            assert (back["step"], back["at"]) == (3, "run")
        assert (
            damaged["state"]
            == lost["state"]
            == ranks[0]["all lost"]["state"] | {"drawn": lost["state"]["drawn"]}
        )


def test_a_node_that_lags_behind_never_wins(ranks: list[Any]) -> None:
    for found in ranks:
        assert found["trained on"]["step"] == 4
        assert (found["lagging"]["step"], found["lagging"]["at"]) == (6, "run")


def test_what_one_node_cannot_do_costs_no_older_checkpoint(ranks: list[Any]) -> None:
    first, _, third = (found["failing"] for found in ranks)
    assert first["sound"][1] == ["node-0/1 3", "node-1/1 3"]
    # the older one goes once every node has named the new one
    assert first["unnamed"][1] == ["node-0/1 3", "node-0/2 3", "node-1/1 3"]
    assert first["named"][0] == third["named"][0] == [3]
    # what one has not read, the others do not wait for
    assert first["uncopied"][0] == third["uncopied"][0] == [3]
    # and then each keeps its own alone
    assert third["alone"][1] == ["node-0/5 2", "node-1/5 1"]
    # a node without a folder: the directory is enough
    for found in (first, third):
        assert found["in the way"] == [[2, "run"], [1, "run"]]


def test_ls_says_whose_files_are_where(
    ranks: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(folder / "failing")
    assert ranks
    main(["checkpoint", "ls", "node-0"])
    assert capsys.readouterr().out.startswith("step-00000005 (ranks 0-1 of 3) ")
    monkeypatch.chdir(folder / "kept")
    main(["checkpoint", "ls", "node-1", "run", f"file://{folder}/kept/store"])
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert rows == [["node-1", "step-00000004"], ["run", "step-00000003"],
                    [f"file://{folder}/kept/store", "step-00000003"]]  # fmt: skip
