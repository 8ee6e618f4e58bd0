"""The one figure for a talk: what a step takes at each peer's own peak, ours beside the peer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.figure import INK, MUTED, OURS, TORCH, bare_axes, blank_figure

Row = Mapping[str, Any]
# peers that were measured on fewer models are left to the full figure
FEWEST_MODELS = 6
NAMES = {
    "torch per block": "torch.utils.checkpoint, each block",
    "Hugging Face's switch": "gradient_checkpointing_enable()",
    "sqrt(n) segments": "torch.utils.checkpoint, √n segments",
    "SAC, all products": "selective checkpointing, all products",
    "SAC, every second": "selective checkpointing, every second",
}


@dataclass(frozen=True, slots=True)
class Beside:
    """A peer and our plans at its peaks: geometric means over the models where both were measured.

    Times are over the untouched model's, ``peak`` is the peer's share of its activations.
    """

    name: str
    models: int
    peak: float
    peer_time: float
    our_time: float


def beside(rows: Sequence[Row]) -> list[Beside]:
    """Every peer that was measured on enough models, the lowest peak first."""
    found = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        of = [
            row
            for row in rows
            if row["peer"] == peer
            and row["status"] == "measured"
            and row["ours_at_its_peak"]["status"] == "measured"
        ]
        if len(of) >= FEWEST_MODELS:
            found.append(
                Beside(
                    name=NAMES.get(peer, peer.replace("compile, budget", "torch.compile, budget")),
                    models=len(of),
                    peak=geometric_mean(row["peak_bytes"] / row["untouched_bytes"] for row in of),
                    peer_time=geometric_mean(row["over_untouched"]["median"] for row in of),
                    our_time=geometric_mean(
                        row["ours_at_its_peak"]["over_untouched"]["median"] for row in of
                    ),
                )
            )
    return sorted(found, key=lambda b: b.peak)


def draw_talk(rows: Sequence[Row]) -> Figure:
    """A line for each peer, from its time to ours."""
    lines = beside(rows)
    figure = blank_figure(12, 0.42 * len(lines) + 2.1)
    axes = figure.subplots()
    bare_axes(axes)
    axes.grid(visible=False, axis="y")
    for y, line in enumerate(lines):
        ours, peer = 100 * (line.our_time - 1), 100 * (line.peer_time - 1)
        axes.plot([ours, peer], [y, y], color="#cbd5e1", linewidth=5, solid_capstyle="round",
                  zorder=1)  # fmt: skip
        for x, color in ((peer, TORCH), (ours, OURS)):
            axes.plot(x, y, marker="o", color=color, markersize=11, linestyle="none", zorder=2)
        low, high = sorted((ours, peer))
        for x, side, text in ((low, "right", ours if ours <= peer else peer),
                              (high, "left", peer if ours <= peer else ours)):  # fmt: skip
            axes.annotate(f"{text:.0f} %", (x, y), (-9 if side == "right" else 9, 0),
                          textcoords="offset points", ha=side, va="center", fontsize=12,
                          color=OURS if text == ours else TORCH)  # fmt: skip
    axes.set_yticks(
        range(len(lines)),
        [f"{line.name}: {100 * line.peak:.0f} % of the peak" for line in lines],
        fontsize=12,
        color=INK,
    )
    axes.set_ylim(len(lines) - 0.4, -0.6)
    highest = max(100 * (max(line.peer_time, line.our_time) - 1) for line in lines)
    axes.set_xlim(-0.16 * highest, 1.12 * highest)
    axes.tick_params(axis="x", labelsize=11)
    axes.set_xlabel(
        "time added to a training step, %",
        fontsize=12,
        color=MUTED,
    )
    fewest, most = min(line.models for line in lines), max(line.models for line in lines)
    figure.suptitle(
        "The same memory in less time", x=0.01, ha="left", fontsize=18, color=INK, fontweight="bold"
    )
    figure.legend(
        handles=[
            Line2D([], [], color=color, marker="o", markersize=11, linestyle="none", label=label)
            for color, label in (
                (OURS, "actckpt, within the peer's peak"),
                (TORCH, f"what people use today (means over {fewest} to {most} models)"),
            )
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=13,
        labelcolor=INK,
    )
    return figure
