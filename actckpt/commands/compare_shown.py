"""What `compare` shows: the table, why little fits, and the plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table

from actckpt.commands.sweep import Row
from actckpt.reporting.figure import INK, MUTED, bare_axes, blank_figure
from actckpt.units import format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# policy -> colour and marker: told apart in grey, too
LOOKS = {
    "auto": ("#c0392b", "o"),
    "optimal": ("#e08a1e", "D"),
    "calls": ("#2e8b6f", "s"),
    "selective": ("#8b5fbf", "P"),
    "full": ("#2a78b5", "v"),
    "sqrt": ("#0f9bb0", "^"),
    "log": ("#b0588b", "X"),
    "rotor": ("#7a6a1f", "*"),
    "none": ("#4a5568", "o"),
}


def make_table(rows: Sequence[Row]) -> Table:
    """The rows as a rich table, a section for each policy."""
    table = Table(box=SIMPLE, pad_edge=False, header_style="bold")
    table.add_column("policy")
    for name in ("budget", "", "predicted", "measured", "of budget", "step", "time", "regions"):
        table.add_column(name, justify="right")
    for i, row in enumerate(rows):
        if i and rows[i - 1].policy != row.policy:
            table.add_section()
        head = (row.policy, f"{row.percent:g} %", format_bytes(row.budget_bytes))
        if not row.fits:
            smallest = row.smallest_bytes
            reached = "" if smallest is None else f" (smallest {format_bytes(smallest)})"
            table.add_row(*head, "", f"does not fit{reached}", style="dim")
            continue
        assert row.measured_bytes is not None
        assert row.ratio is not None
        used = row.measured_bytes / row.budget_bytes
        table.add_row(
            *head,
            "" if row.predicted_bytes is None else format_bytes(row.predicted_bytes),
            format_bytes(row.measured_bytes),
            f"{100 * used:.1f} %",
            "" if row.step_s is None else format_seconds(row.step_s),
            format_percent(row.ratio - 1),
            str(row.regions),
            style="red" if used > 1 else None,
        )
    return table


def why_little_fits(
    rows: Sequence[Row], whole_bytes: int, added_bytes: int, scope: str
) -> list[str]:
    """What stands in the way where less than half of the budgets are met; else nothing.

    Args:
        whole_bytes: what the untouched model was measured at, in that scope.
        added_bytes: what its step adds to parameters, gradients, optimizer state and batch.
    """
    fits = sum(row.fits for row in rows)
    if 2 * fits >= len(rows):
        return []
    lines = [f"{fits} of {len(rows)} fit."]
    smallest = {row.policy: row.smallest_bytes for row in rows if row.smallest_bytes is not None}
    if smallest:
        policy, least = min(smallest.items(), key=lambda item: item[1])
        lines[0] += (
            f" The smallest plan of all needs {format_bytes(least)} "
            f"({100 * least / whole_bytes:.0f} % of the untouched model): {policy}."
        )
    fixed = whole_bytes - added_bytes
    if scope == "step" and fixed > 0:
        lines.append(
            f"{format_bytes(fixed)} ({100 * fixed / whole_bytes:.0f} %) are parameters, gradients, "
            "optimizer state and batch, which recomputation leaves as they are: a budget for the "
            "rest is given with --scope activations. More of the peak is activations with a "
            "larger batch or longer sequences."
        )
    lines.append("Left out, --budgets lie between the smallest plan and the untouched model.")
    return lines


def draw(rows: Sequence[Row], whole_bytes: int, title: str) -> Figure:
    """Measured peak against time ratio, one line for each policy.

    Raises:
        ReportError: matplotlib is not installed.
    """
    figure = blank_figure(7.2, 4.6)
    axes = figure.subplots()
    bare_axes(axes)
    for percent in sorted({row.percent for row in rows}):
        axes.axvline(percent, color="#e5e7eb", linewidth=0.8, zorder=0)
    axes.plot([100], [1], marker="D", color=INK, markersize=6, linestyle="none", zorder=4)
    axes.annotate(
        "untouched",
        (100, 1),
        xytext=(0, -13),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=MUTED,
    )
    for policy in dict.fromkeys(row.policy for row in rows):
        points = sorted(
            {
                (100 * row.measured_bytes / whole_bytes, row.ratio)
                for row in rows
                if row.policy == policy and row.measured_bytes is not None and row.ratio is not None
            }
        )
        if points:
            _draw_policy(axes, policy, points)
    axes.set_xlabel("measured peak, % of the untouched one", color=MUTED, fontsize=9)
    axes.set_ylabel("step time, times the untouched one", color=MUTED, fontsize=9)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    if any(row.fits for row in rows):
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _draw_policy(axes: Axes, policy: str, points: Sequence[tuple[float, float]]) -> None:
    color, marker = LOOKS[policy]
    ours = policy == "auto"
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        marker=marker,
        markersize=7 if ours else 5.5,
        linewidth=1.8 if ours else 1.0,
        color=color,
        label=policy,
        zorder=3 if ours else 2,
        markeredgecolor="white",
        markeredgewidth=0.8,
    )
