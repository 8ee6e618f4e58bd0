"""What the coordinator of a save needs for 256 ranks of 3,000 tensors each, torch's planner beside.

The coordinator is a process of its own, whose processor time and greatest resident memory count.
All other ranks are threads of this process, over one store. They say what they hold and vote as
ranks do; of files they write their manifests, as they are, and 64 bytes in place of each other.

    python -m experiments.ranks_scale [--world N] [--tensors N] [--saves N] [KIND ...]
    python -m experiments.ranks_scale --torch [--world N] [--tensors N] [KIND ...]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from experiments.results import circumstances, markdown_table, write_json_lines, write_markdown
from tests.fleet import Fleet, Items, encoded, looking_rarely, manifests_only, rows

KINDS = {
    "cut": "every tensor cut in rows over all ranks (FSDP), of 8 shapes",
    "shapes": "likewise, each tensor of a shape of its own",
    "replicas": "every tensor on every rank (DDP), of 8 shapes",
}
BUFFERS = 20


@lru_cache(None)
def part(kind: str, world: int, rank: int, columns: int) -> Any:
    """What a rank holds of a tensor: one row, or all of it. The bytes are not what counts here."""
    shape = (1,) if kind == "replicas" else (world,)
    tensor = torch.zeros((*shape, columns))
    return tensor if kind == "replicas" else rows(tensor, rank, world)


def names(tensors: int) -> list[tuple[str, str]]:
    """(item, name) of parameters and of two moments of each."""
    third = tensors // 3
    parameters = [f"model.layers.{n // 9}.mlp.proj_{n % 9}.weight" for n in range(third)]
    moments = [f"state/{p}/{m}" for p in parameters for m in ("exp_avg", "exp_avg_sq")]
    return [("model", p) for p in parameters] + [("optimizer", m) for m in moments]


def items_of(kind: str, world: int, tensors: int, rank: int, step: int) -> Items:
    """What a rank holds: the tensors, buffers that all have, and a random state of its own."""
    found: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    for number, (item, name) in enumerate(names(tensors)):
        columns = 1 + (number if kind == "shapes" else number % 8)
        found[item][name] = part(kind, world, rank, columns)
    buffers = {f"buffer_{n}": torch.full((4,), float(step)) for n in range(BUFFERS)}
    # what is counted are steps
    random = encoded({"torch": torch.tensor([rank, step])}, step=step)
    if kind == "replicas":
        model, optimizer = encoded({**buffers, **found["model"]}), encoded(found["optimizer"])
    else:
        model, optimizer = encoded(buffers, found["model"]), encoded({}, found["optimizer"])
    return {"model": model, "optimizer": optimizer, "random": random}


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Processor seconds of this process, and how far its resident memory grew, in MB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, begin = _resident("VmRSS"), time.process_time()
    work()
    return {
        "cpu_s": time.process_time() - begin,
        "peak_mb": (_resident("VmHWM") - before) / 1e6,
        "kept_mb": (_resident("VmRSS") - before) / 1e6,
    }


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def store(port: int) -> Callable[[], Any]:
    """Connections to the store, one each."""
    return lambda: dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=False, wait_for_workers=False
    )


def coordinate(folder: Path, kind: str, world: int, tensors: int, saves: int, port: int) -> None:
    """The process of rank 0; what it found as lines of JSON."""
    torch.set_num_threads(1)
    fleet = Fleet(folder, world, store=store(port), ranks=[0])
    known = fleet.known[0]
    for step in range(1, saves + 1):
        items = items_of(kind, world, tensors, 0, step)
        outcome: list[Any] = []

        def save(step: int = step, items: Items = items, outcome: list[Any] = outcome) -> None:
            outcome.append(fleet.save(step, lambda rank: items)[0])

        found = measured(save)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        row = {"kind": kind, "save": step, **found, "planned": known.planner.planned}
        print(json.dumps(row), flush=True)


def planned_by_torch(kind: str, world: int, tensors: int) -> dict[str, Any]:
    """What torch's planner needs for the same tensors, from the plans as they come to it."""
    said = [pickle.dumps(_plan(kind, world, tensors, rank)) for rank in range(world)]

    def plan() -> None:
        plans = [pickle.loads(text) for text in said]
        planner = DefaultSavePlanner()
        planner.set_up_planner({}, is_coordinator=True)
        planner.create_global_plan(plans)

    return {
        "kind": kind,
        "save": "torch",
        **measured(plan),
        "messages_mb": sum(map(len, said)) / 1e6,
    }


def _plan(kind: str, world: int, tensors: int, rank: int) -> SavePlan:
    found = []
    for item, encoded_ in items_of(kind, world, tensors, rank, 1).items():
        for name, tensor in encoded_.tensors.items():
            shard = encoded_.shards.get(name)
            shape = tuple(tensor.shape) if shard is None else shard.shape
            offset = (0,) * tensor.dim() if shard is None else shard.offset
            data = TensorWriteData(
                ChunkStorageMetadata(torch.Size(offset), tensor.shape),
                TensorProperties(tensor.dtype),
                torch.Size(shape),
            )
            index = MetadataIndex(f"{item}/{name}", torch.Size(offset))
            found.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    return SavePlan(found, planner_data={})


def saved(kind: str, world: int, tensors: int, saves: int) -> list[dict[str, Any]]:
    """What the coordinator found, while all others take part."""
    torch.set_num_threads(1)
    server: Any = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    with tempfile.TemporaryDirectory() as folder:
        asked = ["coordinate", folder, kind, str(world), str(tensors), str(saves), str(server.port)]
        first = subprocess.Popen(
            [sys.executable, "-m", "experiments.ranks_scale", *asked],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        others = range(1, world)
        fleet = Fleet(Path(folder), world, store=store(server.port), ranks=others)
        for step in range(1, saves + 1):
            # so many ranks that look often keep two cores busy
            with looking_rarely(), manifests_only():
                items = partial(items_of, kind, world, tensors, step=step)
                found = fleet.save(step, items)
            failed = [f for f in found.values() if isinstance(f, Exception)]
            if failed:
                first.kill()
                raise failed[0]
        text, _ = first.communicate()
    return [json.loads(line) for line in text.splitlines()]


def by_torch(kind: str, world: int, tensors: int) -> dict[str, Any]:
    """As `planned_by_torch`, in a process of its own."""
    asked = ["torch", kind, str(world), str(tensors)]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.ranks_scale", *asked],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Every save of every kind, and torch's planner."""
    lines = []
    for row in found:
        what = "torch's planner alone" if row["save"] == "torch" else f"save {row['save']}"
        lines.append(
            [
                f"{row['kind']}: {what}",
                f"{row['cpu_s']:.2f} s",
                f"{row['peak_mb']:.0f} MB",
                f"{row['kept_mb']:.0f} MB",
                str(row.get("planned", "")),
            ]
        )
    head = ["", "processor time", "memory at most", "kept after", "plans so far"]
    return markdown_table(head, lines)


def main() -> None:
    """The experiment, or one of its processes."""
    if sys.argv[1:2] == ["coordinate"]:
        folder, kind, *numbers = sys.argv[2:]
        world, tensors, saves, port = map(int, numbers)
        coordinate(Path(folder), kind, world, tensors, saves, port)
        return
    if sys.argv[1:2] == ["torch"]:
        print(json.dumps(planned_by_torch(sys.argv[2], *map(int, sys.argv[3:]))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", default=[*KINDS])
    parser.add_argument("--world", type=int, default=256)
    parser.add_argument("--tensors", type=int, default=3000)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--torch", action="store_true", help="its planner, in place of saves")
    args = parser.parse_args()
    found = []
    for kind in args.kinds:
        of_kind = kind, args.world, args.tensors
        for row in [by_torch(*of_kind)] if args.torch else saved(*of_kind, args.saves):
            print(row, file=sys.stderr, flush=True)
            found.append(row)
    name = "ranks_scale_torch" if args.torch else "ranks_scale"
    about = circumstances(
        {"torch": torch.__version__},
        ranks=args.world,
        tensors_of_each_rank=args.tensors,
        **{kind: KINDS[kind] for kind in args.kinds},
        time="processor seconds of the coordinator's process, with its own share of the files",
        memory="growth of its resident memory over that before the save",
    )
    write_json_lines(name, about, found)
    write_markdown(name, about, "# Saves of many ranks: what plans them", table(found))


if __name__ == "__main__":
    main()
