"""What the ranks of `tests.test_tiers_of_ranks` do: three of them on two nodes, a folder each.

``python -m tests.tiered_by_ranks FOLDER SCENARIO RANK`` is one of them.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import actckpt
from actckpt.sharded import node_saving
from actckpt.sharded.nodes import Transfer
from tests.ranked import built, digests, group, train

WORLD = 3
PLACES = ("node-0", "node-1", "run", "store")


def node_of(folder: Path, rank: int) -> Path:
    """Ranks 0 and 1 share a node."""
    return folder / f"node-{rank // 2}"


def run_of(folder: Path, rank: int, model: Any, optimizer: Any, **how: Any) -> Any:
    """Every third step in the directory and in a store, every step on the nodes."""
    tiers = [(node_of(folder, rank), 1, 1), (f"file://{folder}/store", 3, 1)]
    given = {"every": 3, "keep_last": 2, "tiers": tiers, **how}
    return actckpt.Checkpointer(folder / "run", model=model, optimizer=optimizer, **given)


def here(model: Any, optimizer: Any) -> dict[str, str]:
    """All of it, and what this rank draws next."""
    return {
        **digests(model.state_dict(), optimizer.state_dict()),
        "drawn": str(torch.rand(2).tolist()),
    }


def resumed(folder: Path, rank: int, world: int = WORLD, to: int = 0) -> dict[str, Any]:
    """What a run of other objects goes on from, and comes to if it trains up to a step."""
    model, optimizer = built(world)
    torch.manual_seed(90 + rank)
    run = run_of(folder, rank, model, optimizer)
    result = run.resume()
    assert result is not None
    path = result.checkpoint.path
    found = {
        "step": result.step,
        "at": path.parent.name,
        "files": len([*path.iterdir()]),
        "skipped": [s.reason for s in result.skipped],
    }
    train(model, optimizer, range(result.step, to), run.step)
    run.close()
    return {**found, "state": here(model, optimizer)}


def tiered(folder: Path, rank: int) -> dict[str, Any]:
    """A run with a tier on each node; what is lost of it, and what it goes on from then."""
    found: dict[str, Any] = {}

    def after(name: str, change: Callable[[], object], world: int = WORLD, to: int = 0) -> None:
        """What is gone on from, once somebody has changed the folders of the run that ended."""
        with group(folder, name, rank, WORLD):
            if not rank:
                _put(folder / "kept", folder)
                change()
            dist.barrier()
        if rank < world:
            with group(folder, f"{name}-resumed", rank, world):
                found[name] = resumed(folder, rank, world, to)

    def lose(*places: str) -> None:
        for place in places:
            shutil.rmtree(folder / place)

    def turn(*nodes: int) -> None:
        for node in nodes:
            _turn(next((folder / f"node-{node}").glob("step-*/model-00001.safetensors")))

    with group(folder, "first", rank, WORLD):
        model, optimizer = built(WORLD)
        torch.manual_seed(rank)
        run = run_of(folder, rank, model, optimizer)
        assert run.resume() is None
        train(model, optimizer, range(4), run.step)
        run.close()
        found["list"] = [[c.step, c.path.parent.name] for c in run.list()]
        found["last"] = [run.last_save.step, run.last_save.verdict]
        found["fourth"] = here(model, optimizer)
        torch.manual_seed(rank)
        dist.barrier()
        if not rank:
            _put(folder, folder / "kept")
    after("killed", lambda: None)
    after("a node lost", lambda: lose("node-0"))
    after("the other lost", lambda: lose("node-1"))
    after("turned on one", lambda: turn(1))
    after("turned on both", lambda: turn(0, 1))
    after("two ranks", lambda: None, 2)
    after("all lost", lambda: lose(*PLACES[:3]))
    after("trained on", lambda: None, to=7)
    # a node comes back as it was long ago
    with group(folder, "lagging", rank, WORLD):
        if not rank:
            _put(folder / "kept", folder, ("node-0", "node-1"))
        dist.barrier()
        found["lagging"] = resumed(folder, rank)
    found |= one_fails(folder / "failing", rank)
    return found


def one_fails(folder: Path, rank: int) -> dict[str, Any]:
    """A node that cannot name a checkpoint, or take another's files, and one without a folder."""
    found: dict[str, Any] = {}
    sending = Transfer.send

    def cannot(*_: Any) -> Any:
        raise OSError("no room")

    def unread(self: Transfer, path: str, *how: Any) -> None:
        sending(self, f"{path}.gone", *how)

    with group(folder, "failing", rank, WORLD):
        if not rank:
            folder.mkdir()
        dist.barrier()
        model, optimizer = built(WORLD)
        run = run_of(folder, rank, model, optimizer, every=None, background=False)

        def step(name: str) -> None:
            train(model, optimizer, range(run.step_count, run.step_count + 1), run.step)
            folders = sorted(folder.glob("node-*/step-*"))
            last = run.last_save
            found[name] = [
                sorted({c.step for c in run.list()}),
                [f"{p.parent.name}/{p.name[-1]} {len([*p.glob('rank-*')])}" for p in folders],
                None if last is None else last.step,
            ]
            dist.barrier()

        step("sound")
        with pytest.MonkeyPatch.context() as patch:
            if rank == 2:
                patch.setattr(node_saving, "free_name", cannot)
            step("unnamed")
        step("named")
        with pytest.MonkeyPatch.context() as patch:
            if rank == 2:
                patch.setattr(Transfer, "send", unread)
            step("uncopied")
        step("alone")
        run.close()
        dist.barrier()
        run = run_of(folder, rank, model, optimizer, every=1, fresh=True)
        dist.barrier()
        if not rank:
            shutil.rmtree(folder / "node-1")
            (folder / "node-1").write_text("in the way")
        dist.barrier()
        train(model, optimizer, range(2), run.step)
        run.close()
        found["in the way"] = [[c.step, c.path.parent.name] for c in run.list()]
    return {"failing": found}


def _put(there: Path, here: Path, places: tuple[str, ...] = PLACES) -> None:
    """The folders as they are elsewhere."""
    for name in places:
        shutil.rmtree(here / name, ignore_errors=True)
        shutil.copytree(there / name, here / name)


def _turn(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def main(folder: Path, scenario: str, rank: int) -> None:
    """Runs it, and writes what came of it."""
    logging.basicConfig()
    torch.set_num_threads(1)
    found = tiered(folder, rank)
    (folder / f"{scenario}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
