"""A bit turns in any region of any file that three ranks wrote: who reads it names it, all go back.

``ACTCKPT_FAULTS=whole`` turns one in every seventh byte of documents and every third of the headers
of tensors; the suite one in every other line, and in each part of a file of tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from actckpt.checkpoint.encoding import encode
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.names import MANIFEST
from actckpt.checkpoint.retention import Keep
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.checkpoint.verification import verify_files
from actckpt.errors import CheckpointFormatError
from actckpt.resuming.cadence import Cadence
from actckpt.resuming.choosing_together import TogetherChoice
from actckpt.resuming.company import Alone
from actckpt.resuming.places import Places
from actckpt.resuming.shared_directory import SharedDirectory
from tests.test_drawn_meshes import World, local
from tests.threaded_ranks import exchanges, on_every_rank, saved_together

WORLD = 3
WHOLE = os.environ.get("ACTCKPT_FAULTS") == "whole"
CUT = World((WORLD,), ((Shard(0),), (Replicate(),)))


def wholes(step: int) -> tuple[torch.Tensor, ...]:
    """What is cut over the ranks, and what all of them have."""
    seeded = torch.Generator().manual_seed(step)
    return torch.randn(7, 5, generator=seeded), torch.randn(4, generator=seeded)


def snapshot(step: int, rank: int) -> Snapshot:
    """Of each kind of file every rank has its own."""
    cut, same = (CUT.part(n, whole, rank) for n, whole in enumerate(wholes(step)))
    own = {"stream": torch.arange(64) + rank, "rank": rank}
    items = {
        "model": encode({"cut": cut, "same": same}, "model", sharded=True),
        "random": encode(own, "random", sharded=True),
        "identities": encode({}, "identities"),
    }
    return Snapshot(step, items, "", {"loss": 0.5}, "", {"torch": "2"})


def regions(path: Path) -> Iterator[int]:
    """Where to turn a bit: in each line of a document; in a file of tensors at its parts."""
    data = path.read_bytes()
    if path.suffix == ".json":
        ends = [at for at, byte in enumerate(data) if byte == ord("\n")] or [len(data) - 1]
        yield from range(0, len(data), 7) if WHOLE else (max(0, at - 2) for at in ends[::2])
        return
    header = 8 + int.from_bytes(data[:8], "little")
    yield from range(0, header, 3) if WHOLE else (0, 7, 8, header // 2, header - 1)
    yield from (header, (header + len(data)) // 2, len(data) - 1)


def resumed(at: Path) -> list[Any]:
    """What each rank goes on from."""

    def like(rank: int) -> Callable[[str, str, tuple[int, ...]], Any]:
        cut, _ = (CUT.part(n, whole, rank) for n, whole in enumerate(wholes(1)))
        return lambda item, name, shape: cut if (item, name) == ("model", "cut") else None

    with exchanges(WORLD) as ranks:

        def choose(rank: int) -> Any:
            directory = SharedDirectory(str(at), Files(), Keep(), "full", ranks[rank])
            places = Places(directory, Cadence(None), company=Alone())
            choice = TogetherChoice(
                places, lambda: like(rank), nn.Linear(1, 1), frozenset(["model"])
            )
            return choice.newest()

        return on_every_rank(WORLD, choose)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints."""
    folder: Path = tmp_path_factory.mktemp("turned")
    for step in (1, 2):
        saved_together(folder, [snapshot(step, rank) for rank in range(WORLD)], serial=step)
    return folder


FILES = [
    MANIFEST,
    *(f"{what}-{rank:05d}.{ending}" for rank in range(WORLD) for what, ending in (
        ("rank", "json"), ("state", "json"), ("model", "safetensors"), ("random", "safetensors"),
    )),
]  # fmt: skip


def test_these_are_all_files_and_they_are_read(run: Path) -> None:
    assert sorted(FILES) == sorted(p.name for p in (run / "step-00000002").iterdir())
    for rank, chosen in enumerate(resumed(run)):
        assert chosen.checkpoint.step == 2
        _check(chosen, 2, rank)


@pytest.mark.parametrize("file", FILES)
def test_a_turned_bit_is_named_and_the_older_checkpoint_taken(run: Path, file: str) -> None:
    path = run / "step-00000002" / file
    data = path.read_bytes()
    # what is of one rank alone nobody else reads
    readers = {int(file[7:12])} if file.startswith("random") else {*range(WORLD)}
    try:
        for at in regions(path):
            path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            for rank, chosen in enumerate(resumed(run)):
                assert chosen.checkpoint.step == 1, (at, rank)
                _check(chosen, 1, rank)
                (skipped,) = chosen.skipped
                assert skipped.name == "step-00000002"
                assert file in skipped.reason, (at, skipped)
                if file != MANIFEST:
                    assert int(skipped.reason.split(":")[0].removeprefix("rank ")) in readers
            with pytest.raises(CheckpointFormatError, match=file):
                verify_files(Files(), str(path.parent))
    finally:
        path.write_bytes(data)


def _check(chosen: Any, step: int, rank: int) -> None:
    """Every byte is that of the step."""
    state = chosen.items["model"]
    for name, whole in zip(("cut", "same"), wholes(step), strict=True):
        expected = CUT.part(("cut", "same").index(name), whole, rank)
        assert torch.equal(local(state[name]), local(expected))
    assert chosen.items["random"]["rank"] == rank
    assert torch.equal(chosen.items["random"]["stream"], torch.arange(64) + rank)


@pytest.mark.parametrize("serials", [(2, 3), (2, 2)])
def test_of_two_checkpoints_of_one_step_all_ranks_take_the_same(
    serials: tuple[int, int], tmp_path: Path
) -> None:
    """As a run that was restored leaves them, or somebody who copied two runs into one folder."""
    names = []
    for content, serial in zip((5, 6), serials, strict=True):
        of_one_step = [replace(snapshot(content, rank), step=2) for rank in range(WORLD)]
        names.append(saved_together(tmp_path, of_one_step, serial=serial).path.name)
    assert names == ["step-00000002", "step-00000002.1"]
    for rank, chosen in enumerate(resumed(tmp_path)):
        assert chosen.checkpoint.path.name == names[1]
        _check(chosen, 6, rank)
    path = tmp_path / names[1] / "model-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for rank, chosen in enumerate(resumed(tmp_path)):
        assert chosen.checkpoint.path.name == names[0]
        _check(chosen, 5, rank)
