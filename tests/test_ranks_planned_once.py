"""Ranks that save again say what is new and no more, and nothing is taken for what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import FileEntry
from actckpt.checkpoint.names import rank_file
from actckpt.checkpoint.verification import read_shares, verify_files
from actckpt.errors import CheckpointSaveError
from actckpt.sharded import committing, share_writing, sight
from actckpt.sharded.exchange import Exchange
from actckpt.sharded.known import Known
from actckpt.sharded.loading import ShareReading
from actckpt.sharded.planning import Holding, Planner
from tests.fleet import Fleet, Items, encoded, rows

WORLD = 3
WHOLE = torch.arange(24.0).reshape(6, 4)


class Held:
    """What the ranks of a fleet have: parts, replicas, buffers of their own."""

    def __init__(self) -> None:
        self.replica = torch.arange(5.0)
        self.buffers = [torch.tensor([1.0, 2.0])] * WORLD
        self.extra: dict[str, torch.Tensor] = {}
        self.step = 0

    def items(self, rank: int) -> Items:
        whole = {"replica": self.replica, "buffer": self.buffers[rank], **self.extra}
        model = encoded(whole, {"cut": rows(WHOLE + self.step, rank, WORLD)})
        random = encoded({"torch": torch.tensor([rank, self.step])}, step=self.step)
        return {"model": model, "random": random}


class Saved:
    """A fleet that saves, and what it told and read."""

    def __init__(self, folder: Path) -> None:
        self.held = Held()
        self.fleet = Fleet(folder, WORLD)
        self.planner = self.fleet.known[0].planner

    def again(self) -> dict[int, Any]:
        """One save; what each rank got."""
        self.held.step += 1
        return self.fleet.save(self.held.step, self.held.items)

    def counted(self) -> tuple[list[int], int]:
        """So far: layouts told by rank, plans made."""
        told = [self.fleet.known[rank].holding.told for rank in range(WORLD)]
        return told, self.planner.planned

    def check(self, found: dict[int, Any]) -> None:
        """That every rank finds in the checkpoint what it had."""
        assert all(isinstance(c, Checkpoint) for c in found.values()), found
        path, manifest = str(found[0].path), found[0].manifest
        verify_files(Files(), path)
        for rank in range(WORLD):
            reading = ShareReading(
                Files(), path, manifest, rank=rank, like=lambda *_: None, same_world=True
            )
            read = reading.items()
            for item, expected in self.held.items(rank).items():
                for name, tensor in expected.tensors.items():
                    wanted = WHOLE + self.held.step if name == "cut" else tensor
                    assert torch.equal(read[item][name], wanted), (rank, name)
                    assert read[item][name].dtype == wanted.dtype
            assert read["random"]["step"] == self.held.step


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


def test_only_the_first_save_is_planned(saved: Saved) -> None:
    saved.check(saved.again())
    assert saved.counted() == ([1] * WORLD, 1)
    for _ in range(3):
        saved.check(saved.again())
    # nor are lists of tensors read that are as planned
    with mock.patch.object(sight, "_check_whole", side_effect=AssertionError):
        saved.check(saved.again())
    # what the content is does not matter as long as replicas are equal
    saved.held.replica = saved.held.replica + 1
    saved.check(saved.again())
    assert saved.counted() == ([1] * WORLD, 1)


def test_what_is_told_again_is_small(saved: Saved) -> None:
    saved.held.extra = {f"layers.{n}.weight": torch.full((3,), float(n)) for n in range(400)}
    sizes: list[int] = []
    call = Exchange._call

    def counting(self: Exchange, method: str, *args: Any) -> Any:
        if len(args) == 2:
            sizes[-1] += len(args[1])
        return call(self, method, *args)

    with mock.patch.object(Exchange, "_call", counting):
        for _ in range(2):
            sizes.append(0)
            saved.check(saved.again())
    assert sizes[0] > 30_000
    assert sizes[1] < 8_000


@pytest.mark.parametrize(
    "change",
    [
        {"fresh": torch.ones(3)},
        {"other": torch.ones(2, dtype=torch.float64)},
        {"other": torch.ones(1, 2)},
        {},
    ],
    ids=["a parameter more", "dtype", "shape", "one less"],
)
def test_a_changed_layout_is_noticed(saved: Saved, change: dict[str, torch.Tensor]) -> None:
    saved.held.extra = {"other": torch.ones(2)}
    saved.check(saved.again())
    saved.held.extra = change
    for _ in range(2):
        saved.check(saved.again())
    assert saved.counted() == ([2] * WORLD, 2)


def test_a_rank_that_forgot_is_told_and_tells(saved: Saved) -> None:
    saved.check(saved.again())
    saved.fleet.known[1] = Known()
    for _ in range(2):
        saved.check(saved.again())
    assert saved.counted() == ([1] * WORLD, 1)
    # the coordinator as well: it asks
    saved.fleet.known[0].planner = Planner()
    for _ in range(2):
        saved.check(saved.again())
    told, planned = saved.counted()
    assert sorted(told) == [1, 1, 2] or told == [2] * WORLD
    assert saved.fleet.known[0].planner.planned == 1
    assert planned == 1


def test_replicas_that_begin_to_differ_are_kept_apart(saved: Saved) -> None:
    for _ in range(2):
        saved.check(saved.again())
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    # random states differ from the first save on
    for buffers, plans in (
        ([one, two, one], 2),
        ([two, one, two], 2),
        ([one, two, two], 3),
        ([two, two, two], 4),
        ([one, one, one], 4),
        ([one, one, two], 5),
    ):
        saved.held.buffers = buffers
        saved.check(saved.again())
        assert saved.planner.planned == plans, buffers
    assert saved.counted()[0] == [1] * WORLD


def test_who_has_another_plan_is_refused(saved: Saved) -> None:
    saved.check(saved.again())
    said = saved.planner.reply

    def stale(rank: int, messages: Any) -> dict[str, Any]:
        return {**said(rank, messages), "task": "of another save"}

    with mock.patch.object(saved.planner, "reply", stale):
        found = saved.again()
    for error in found.values():
        assert isinstance(error, CheckpointSaveError)
        assert "is to do as rank 0 planned" in str(error)
    saved.check(saved.again())

    # one that votes for another is found by its vote
    take = Holding.take

    def other(self: Holding, told: Any) -> Any:
        done, task = take(self, told)
        return done, "another" if self is saved.fleet.known[2].holding else task

    with mock.patch.object(Holding, "take", other):
        found = saved.again()
    assert all("rank 2 wrote by plan another" in str(error) for error in found.values())
    saved.check(saved.again())


def content_unheard(planner: Any) -> None:
    """As if replicas were equal for ever."""
    planner._still_apart = lambda holders, grouped: planner._apart


def layout_unheard(planner: Any) -> None:
    """As if every rank held what it held first."""
    plan = planner.plan

    def deaf(said: Any, fetch: Any, ask: Any) -> Any:
        if planner._keys:
            said = [{**s, "layout": k} for s, k in zip(said, planner._keys, strict=True)]
        return plan(said, fetch, ask)

    planner.plan = deaf


@pytest.mark.parametrize("mutant", [content_unheard, layout_unheard])
def test_mutants_are_caught(saved: Saved, mutant: Callable[[Any], None]) -> None:
    saved.check(saved.again())
    mutant(saved.planner)
    saved.held.buffers = [torch.ones(2), torch.zeros(2), torch.ones(2)]
    if mutant is layout_unheard:
        saved.held.extra = {"fresh": torch.ones(3)}
    found = saved.again()
    with pytest.raises(AssertionError):
        saved.check(found)


def test_a_list_of_tensors_that_is_not_as_planned_is_read(saved: Saved) -> None:
    saved.check(saved.again())
    write = share_writing.write_share

    def lossy(files: Files, directory: str, *args: Any, rank: int, **more: Any) -> Any:
        share, entry = write(files, directory, *args, rank=rank, **more)
        if rank != 1:
            return share, entry
        left = {name: t for name, t in share.tensors.items() if name != "model/cut"}
        share = replace(share, tensors=left)
        Path(directory, rank_file(rank)).unlink()
        with files.writing(f"{directory}/{rank_file(rank)}") as sink:
            sink.write(share.to_bytes())
        return share, FileEntry(sink.written_bytes, sink.checksum)

    with mock.patch.object(committing, "write_share", lossy):
        found = saved.again()
    for error in found.values():
        assert isinstance(error, CheckpointSaveError)
        assert "model/cut" in str(error)
    saved.check(saved.again())


def test_replicas_of_a_part_have_to_be_equal(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 4)
    whole = torch.arange(8.0).reshape(4, 2)
    changed = 0

    def items(rank: int) -> Items:
        # two halves, each on two ranks
        part, shard = rows(whole, rank // 2, 2)
        return {"model": encoded({}, {"x": (part + changed * (rank == 3), shard)})}

    for _ in range(2):
        assert all(isinstance(c, Checkpoint) for c in fleet.save(1, items).values())
    changed = 1
    for error in fleet.save(2, items).values():
        assert isinstance(error, CheckpointSaveError)
        assert "ranks 2 and 3 hold the same part of it with other content" in str(error)
    changed = 0
    assert all(isinstance(c, Checkpoint) for c in fleet.save(3, items).values())
    assert fleet.known[0].planner.planned == 1


def test_stages_with_names_of_their_own_are_planned_once(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 4)
    shared = torch.arange(3.0)

    def items(rank: int) -> Items:
        stage = rank // 2
        whole = {f"stage_{stage}.weight": torch.full((4,), float(stage)), "shared": shared}
        return {"model": encoded(whole, {f"stage_{stage}.cut": rows(WHOLE, rank % 2, 2)})}

    for step in range(3):
        found = fleet.save(step, items)
        made = found[3]
        assert isinstance(made, Checkpoint), found
        manifest = verify_files(Files(), str(made.path))
        tensors = read_shares(Files(), str(made.path), manifest).tensors(None, "")
        assert sorted(tensors) == [
            "model/shared",
            *(f"model/stage_{s}.{n}" for s in range(2) for n in ("cut", "weight")),
        ]
        shared = shared + 1
    assert fleet.known[0].planner.planned == 1

    # one that holds a part, and another of another type
    def mixed(rank: int) -> Items:
        whole = WHOLE.double() if rank else WHOLE
        return {"model": encoded({}, {"cut": rows(whole, rank, 4)})}

    for error in fleet.save(4, mixed).values():
        assert isinstance(error, CheckpointSaveError)
        assert "ranks have to train one and the same model" in str(error)
