"""Our plans beside what people use today, on the same models in one run.

For every peer: its activation peak and time, what our planner does at that peak, and what at that
time. Models that are named are measured and replace their rows in the results. Planners of others
are no dependency: `experiments.peers.planners` says how to install them.

    python -m experiments.peers [MODEL ...] [--quick] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from experiments.arguments import add_models
from experiments.peers.arms import GROUPS, PEERS
from experiments.peers.deep import DEEP
from experiments.peers.figure import draw
from experiments.peers.measure import Case, Row, rows_of
from experiments.peers.models import EVERY, MODELS, SEED
from experiments.peers.table import tables
from experiments.peers.talk import beside, draw_talk
from experiments.progress import progress
from experiments.results import FOLDER, circumstances, write_json_lines, write_markdown

ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.peers", description=__doc__)
    add_models(parser, EVERY)
    parser.add_argument("--group", action="append", choices=GROUPS, help="only these peers")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds, at least 2")
    parser.add_argument(
        "--quick", action="store_true", help="small models, to try; writes to runs/peers"
    )
    parser.add_argument(
        "--peaks-only",
        action="store_true",
        help="no plans sought at the peers' times, only taken: a fifth of the time",
    )
    parser.add_argument("--deep", action="store_true", help="the deep models")
    parser.add_argument("--write", action="store_true", help="only tables and plot, anew")
    options = parser.parse_args()
    names = options.models or list(DEEP if options.deep else MODELS)
    folder = Path("runs/peers") if options.quick else FOLDER
    about, rows = _read(folder)
    if options.write:
        _write(folder, about, rows)
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the allocation log's own lines
    groups = options.group or GROUPS
    with progress(len(names) * len(groups), "model x group of peers") as done:
        for name in names:
            for group in groups:
                peers = tuple(peer.name for peer in PEERS.values() if peer.group == group)
                case = Case(name, peers, options.quick, options.rounds, options.peaks_only)
                versions, found = _in_a_fresh_process(case)
                rows = _merged(rows, found)
                about = _about(about.get("versions", {}) | versions)
                _write(folder, about, rows)
                done(f"{name}, {group}: {', '.join(_short(row) for row in found)}")


def _in_a_fresh_process(case: Case) -> tuple[dict[str, str], list[Row]]:
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(rows_of, case).result()
    except Exception as error:  # the untouched model failed, or the process died
        status = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        common = {"model": case.model, "quick": case.quick, "rounds": case.rounds}
        return {}, [
            {**common, "peer": peer, "group": PEERS[peer].group, "status": status}
            for peer in case.peers
        ]


def _merged(rows: list[Row], found: list[Row]) -> list[Row]:
    """Old rows and new ones, in the order of the models and peers."""
    new = {(row["model"], row["peer"]): row for row in found}
    kept = {(row["model"], row["peer"]): row for row in rows} | new
    return [kept[m, p] for m in EVERY for p in PEERS if (m, p) in kept]


def _read(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    path = folder / "peers.jsonl"
    if not path.exists():
        return {}, []
    first, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return first["about"], rows


def _about(versions: dict[str, str]) -> dict[str, Any]:
    return circumstances(
        versions,
        seed=SEED,
        models="experiments/peers/models.py, random weights, float32 (Mixtral bf16), no key-value "
        "cache, no optimizer, gradients None when a step begins",
        peak="highest level of the allocator's log over the start of a step, without the storages "
        "that end as gradients",
        time="processor time of one thread, arms of a group interleaved: medians of the ratios "
        "round by round; A/A is the untouched model against itself",
        budget="ours at its peak: the peer's measured peak with scope='activations', and more "
        "where the measured peak leaves room; ours at its time: the smallest budget whose plan is "
        "predicted to be no slower than the peer, by bisection (with --peaks-only the lowest of "
        "those at the peaks of its group that is measured no slower), or that at its peak where it "
        "is lower and measured no slower",
    )


def _write(folder: Path, about: dict[str, Any], rows: list[Row]) -> None:
    rounds = {row["model"]: row["rounds"] for row in rows}
    about = about | {"rounds": ", ".join(f"{model} {n}" for model, n in rounds.items())}
    write_json_lines("peers", about, rows, folder=folder)
    write_markdown(
        "peers",
        about,
        "# Beside what people use today",
        "Activation peak and step time, both over the untouched model's. Win, tie and loss: at its "
        "peak by our time over the peer's, a tie within the A/A spread; at its time by our peak "
        "over the peer's, a tie within 1 %, a loss where we are slower by more than that spread. "
        "\\* changes buffers (BatchNorm's statistics) as the untouched model does not.",
        *tables(rows),
        "![each peer's time and ours at its peak](peers_talk.png)",
        "![peak against time](peers.png)",
        folder=folder,
    )
    if any("peak_bytes" in row for row in rows):
        draw(rows).savefig(folder / "peers.png")
    if beside(rows):
        draw_talk(rows).savefig(folder / "peers_talk.png")


def _short(row: Row) -> str:
    if row["status"] != "measured":
        return f"{row['peer']} {row['status'].split(':')[0]}"
    ours = row["ours_at_its_peak"].get("over_peer", {}).get("median", float("nan"))
    return f"{row['peer']} {ours:.3f}"


if __name__ == "__main__":
    main()
