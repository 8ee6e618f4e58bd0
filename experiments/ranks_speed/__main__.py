"""The command: ranks that save, other ranks that load, and a table."""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import experiments.ranks_speed as question
from experiments.ranks_speed.rank import MIB, SEED
from experiments.results import circumstances, markdown_table, write_json_lines, write_markdown

HERE = Path(__file__).parent.parent.parent


def launched(folder: Path, phase: str, world: int, mib: int, rounds: int) -> dict[str, Any]:
    """What the ranks of one phase took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "experiments.ranks_speed.rank", str(folder), phase]
    ranks = [
        subprocess.Popen(
            [*command, str(mib), str(rounds)], cwd=HERE, env=environment | {"RANK": str(rank)}
        )
        for rank in range(world)
    ]
    failed = [rank for rank in ranks if rank.wait()]
    if failed:
        raise SystemExit(f"a rank of the phase {phase} failed")
    found: dict[str, Any] = json.loads((folder / f"{phase}.json").read_text(encoding="utf-8"))
    return found


def shown(values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.3f} ({low:.3f}–{high:.3f}) s"


def ratios_of(saved: dict[str, Any], loaded: dict[str, Any]) -> dict[str, float]:
    """What is asked, as ratios of medians; each beside that of ours to itself."""

    def stall(arm: str) -> float:
        return float(statistics.median(saved[arm]["stall_s"]))

    def durable(arm: str) -> float:
        return float(statistics.median(saved[arm]["durable_s"]))

    def load(arm: str) -> float:
        return float(statistics.median(loaded[arm]["durable_s"]))

    peers = [arm for arm in saved if arm.startswith("DCP")]
    return {
        "stall / DCP's best": stall("actckpt") / min(map(stall, peers)),
        "stall again / stall": stall("actckpt again") / stall("actckpt"),
        "durable and verified / DCP's best": durable("actckpt") / min(map(durable, peers)),
        "durable and verified / DCP save": durable("actckpt") / durable("DCP save"),
        "the same, background=False": durable("actckpt, background=False") / durable("DCP save"),
        "durable again / durable": durable("actckpt again") / durable("actckpt"),
        "restore / DCP load": load("actckpt restore") / load("DCP load"),
        "restore again / restore": load("actckpt restore again") / load("actckpt restore"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=question.__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="of all ranks together")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--other", type=int, default=2, help="ranks that load it")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        saving = launched(Path(place), "save", options.world, options.mib, options.rounds)
        loading = launched(Path(place), "load", options.other, options.mib, options.rounds)
    saved, loaded = saving["times"], loading["times"]
    ratios = ratios_of(saved, loaded)
    about = circumstances(
        saving["versions"],
        seed=SEED,
        rounds=options.rounds,
        state=f"{options.world * saving['share_bytes'] / MIB:.0f} MiB over {options.world} ranks "
        "(FSDP2, gloo): parameters of 1 MiB with AdamW",
        time="wall, of the slowest rank; median and quartiles; loading is from the page cache",
    )
    rows = [{"arm": arm, **times} for arm, times in (saved | loaded).items()]
    name = f"ranks_speed_{options.mib}"
    write_json_lines(name, about, [*rows, {"ratios": ratios}])
    write_markdown(
        name,
        about,
        "# Checkpoints of many ranks, beside torch.distributed.checkpoint",
        f"{options.world} ranks save, {options.other} load. Stall: until training goes on. "
        "Durable: until the state is on the device; ours has read every byte back and verified it "
        "by then, DCP has synced its files. dd writes as many zeros.",
        markdown_table(
            ("", "stall", "durable"),
            [(arm, shown(t["stall_s"]), shown(t["durable_s"])) for arm, t in saved.items()],
        ),
        markdown_table(("", "time"), [(arm, shown(t["durable_s"])) for arm, t in loaded.items()]),
        markdown_table(("ratio of medians", ""), [(k, f"{v:.2f}") for k, v in ratios.items()]),
    )


if __name__ == "__main__":
    main()
