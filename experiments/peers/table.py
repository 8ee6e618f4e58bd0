"""The tables of `python -m experiments.peers`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.peers.verdict import (
    LOSS,
    TIE,
    WIN,
    at_its_peak,
    at_its_time,
    noise,
    plan_at_its_time,
)
from experiments.results import markdown_table

Row = Mapping[str, Any]
# a buffer that differs by more than rounding: a statistic that moved twice
MOVED = 1e-3


def tables(rows: Sequence[Row]) -> list[str]:
    """A summary, and a table for each model."""
    parts = ["## Wins, ties and losses", _summary(rows)]
    for model in dict.fromkeys(row["model"] for row in rows):
        of = [row for row in rows if row["model"] == model]
        parts.append(f"## {model}")
        parts.append(
            "\n".join(f"- {r['peer']}: {r['status']}" for r in of if "peak_bytes" not in r)
        )
        measured = [row for row in of if row["status"] == "measured"]
        if not measured:
            continue
        first = measured[0]
        parts += [
            f"{first['what']}: {first['untouched_bytes'] / 1e6:.1f} MB of activations, "
            f"{first['untouched_s']:.2f} s a step.",
            markdown_table(
                [
                    "", "peak / time", "gradients", "ours at its peak", "over its time", "",
                    "ours at its time", "over its peak", "", "A/A",
                ],
                [_line(row) for row in measured],
            ),
        ]  # fmt: skip
    return [part for part in parts if part]


def _summary(rows: Sequence[Row]) -> str:
    verdicts: tuple[Callable[[Row], str], ...] = (at_its_peak, at_its_time)
    lines = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        of = [row for row in rows if row["peer"] == peer and row["status"] == "measured"]
        if not of:
            continue
        cells = []
        for verdict in verdicts:
            found = Counter(verdict(row) for row in of)
            cells.append(" / ".join(str(found[v]) for v in (WIN, TIE, LOSS)))
        lines.append([peer, str(len(of)), *cells])
    return markdown_table(["", "models", "at its peak", "at its time"], lines)


def _line(row: Row) -> list[str]:
    star = "\\*" if row["buffers"] is None or row["buffers"] > MOVED else ""
    cells = [row["peer"] + star, _point(row, row), _gradients(row["gradients"])]
    for first, ours, verdict in (
        (True, row["ours_at_its_peak"], at_its_peak(row)),
        (False, plan_at_its_time(row), at_its_time(row)),
    ):
        if ours["status"] != "measured":
            cells += [ours["status"], "", verdict]
            continue
        wrong = "" if ours["gradients"] == 0 else f" gradients {_gradients(ours['gradients'])}"
        refused = " refused" if first and ours["refused"] else ""
        over = (
            f"{ours['over_peer']['median']:.3f}"
            if first
            else f"{ours['peak_bytes'] / row['peak_bytes']:.3f}"
        )
        cells += [_point(ours, row) + refused + wrong, over, verdict]
    return [*cells, f"±{noise(row):.3f}"]


def _point(of: Row, row: Row) -> str:
    share = of["peak_bytes"] / row["untouched_bytes"]
    return f"{share:.3f} / {of['over_untouched']['median']:.3f}"


def _gradients(difference: float | None) -> str:
    if difference is None:
        return "missing"
    return "equal" if difference == 0 else f"{difference:.0e} off"
