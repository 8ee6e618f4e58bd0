"""The command: every arm measured, a table, a plot."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import experiments.checkpoint_speed as question
from experiments.checkpoint_speed.measure import Times, measured, reading, slowdown
from experiments.checkpoint_speed.peers import peers, process_group
from experiments.checkpoint_speed.subject import AT_ONCE, MIB, SEED, Subject
from experiments.results import (
    FOLDER,
    circumstances,
    markdown_table,
    write_json_lines,
    write_markdown,
)

Row = dict[str, Any]


def rows_of(times: dict[str, Times]) -> list[Row]:
    rows = []
    for name, found in times.items():
        row: Row = {"arm": name}
        for kind, values in (("stall", found.stall_s), ("durable", found.durable_s)):
            low, median, high = statistics.quantiles(values, n=4)
            row[f"{kind}_s"] = {"median": median, "low": low, "high": high, "all": values}
        rows.append(row)
    return rows


def draw(name: str, rows: list[Row]) -> None:
    """Stall and durable time of every arm as bars, with the rounds as points."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1), layout="constrained")
    for at, row in enumerate(reversed(rows)):
        for kind, color, height in (("durable", "#c6d4e3", 0.7), ("stall", "#1f5a94", 0.35)):
            axes.barh(at, row[f"{kind}_s"]["median"], height, color=color)
            points = row[f"{kind}_s"]["all"]
            axes.plot(points, [at] * len(points), "|", color="black", markersize=4)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in reversed(rows)])
    axes.set_xlabel("seconds: dark until training goes on, light until durable")
    figure.savefig(FOLDER / f"{name}.png", dpi=120)


def shown(value: Row) -> str:
    return f"{value['median']:.3f} ({value['low']:.3f}–{value['high']:.3f}) s"


def ratios_of(rows: list[Row], slower: dict[str, float]) -> dict[str, float]:
    """What is asked of a checkpoint, as ratios of medians."""
    by_name = {row["arm"]: row for row in rows}

    def stall_s(arm: str) -> float:
        return float(by_name[arm]["stall_s"]["median"])

    def durable_s(arm: str) -> float:
        return float(by_name[arm]["durable_s"]["median"])

    at_once = durable_s(f"actckpt, {AT_ONCE}")
    return {
        "stall / memcpy, tensor by tensor": stall_s("actckpt")
        / stall_s("memcpy, tensor by tensor"),
        "stall / memcpy, in one piece": stall_s("actckpt") / stall_s("memcpy, in one piece"),
        "durable / dd": durable_s("actckpt") / durable_s("dd conv=fsync"),
        "durable / dd again": durable_s("actckpt") / durable_s("dd conv=fsync again"),
        "durable, background=False / dd": at_once / durable_s("dd conv=fsync"),
        "durable, background=False / dd again": at_once / durable_s("dd conv=fsync again"),
        "dd again / dd": durable_s("dd conv=fsync again") / durable_s("dd conv=fsync"),
        # a difference of durable times is less than they vary
        "verification / dd": stall_s("actckpt verification") / durable_s("dd conv=fsync"),
        "restore / load_file, xxh3": stall_s("actckpt restore")
        / stall_s("safetensors load_file, xxh3"),
        "training step during a save / without": slower["a save"],
        "training step without / without": slower["nothing"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=question.__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    parser.add_argument("--alone", action="store_true", help="no peers, whose threads stay")
    parser.add_argument("--threads", type=int, default=None, help="torch's own by default")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        subject = Subject(folder, options.mib)
        arms = subject.arms()
        if not options.alone:
            process_group(folder)
            arms |= peers(subject)
        writing = rows_of(measured(subject, arms, options.rounds))
        back = rows_of(reading(subject, options.rounds))
        slower = slowdown(subject, options.rounds)
        versions = subject.runs["behind"].save().manifest.versions
        staging_bytes = subject.runs["behind"].staging_bytes
        for run in subject.runs.values():
            run.close()
    ratios = ratios_of([*writing, *back], slower)
    about = circumstances(
        versions,
        seed=SEED,
        rounds=options.rounds,
        state=f"{subject.size_bytes / MIB:.0f} MiB: parameters of 1 MiB with AdamW",
        staging=f"{staging_bytes / MIB:.0f} MiB",
        time="wall; median and quartiles; reading is from the page cache",
    )
    name = f"checkpoint_speed_{options.mib}{'_alone' if options.alone else ''}"
    write_json_lines(name, about, [*writing, *back, {"ratios": ratios}])
    draw(name, writing)
    write_markdown(
        name,
        about,
        "# Checkpoint speed",
        "Stall: until training goes on. Durable: until the state is on the device; ours has read "
        "every byte back and verified it by then, the others have not. dd writes as many zeros.",
        markdown_table(
            ("", "stall", "durable"),
            [(r["arm"], shown(r["stall_s"]), shown(r["durable_s"])) for r in writing],
        ),
        markdown_table(("", "time"), [(r["arm"], shown(r["stall_s"])) for r in back]),
        markdown_table(("ratio of medians", ""), [(k, f"{v:.2f}") for k, v in ratios.items()]),
    )


if __name__ == "__main__":
    main()
