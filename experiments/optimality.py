"""How far plans are from the optimum: overhead, lower bound and gap; how long the solvers take.

Everything is relative to the cost model: predicted seconds of operations measured on this machine.
On small graphs every way to keep, drop and group results is tried, and the best is the optimum
among plans without bursts inside bursts. `optimal` does that there, too; that column generation
alone finds it is what tests/test_optimal.py asks.

    python -m experiments.optimality [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

import actckpt
from experiments.figure import INK, MUTED, OURS, TORCH, bare_axes, blank_figure
from experiments.peers.models import MODELS, built
from experiments.progress import progress
from experiments.results import (
    FOLDER,
    circumstances,
    markdown_table,
    write_json_lines,
    write_markdown,
)

SHARES = (0.75, 0.5, 0.35, 0.25)
LAYERS = (6, 12, 24, 48, 96)
SEED = 0

Row = dict[str, Any]


class Caught:
    """A policy that recomputes nothing, and remembers what it was asked about."""

    graph: actckpt.Graph
    profile: actckpt.Profile

    def __call__(
        self, graph: actckpt.Graph, profile: actckpt.Profile, _: int | None
    ) -> actckpt.Plan:
        self.graph, self.profile = graph, profile
        return actckpt.Plan("none")


def caught(model: nn.Module, batch: Any, **loss: Any) -> Caught:
    """The graph and the profile of a model's step; only activations weigh anything in them."""
    found = Caught()
    # no budget is asked for, but the scope decides what the policy is shown
    actckpt.optimize(model, None, batch=batch, policy=found, scope="activations", **loss)
    actckpt.revert(model)
    return found


def row_of(name: str, found: Caught, share: float) -> Row:
    """One model at one budget."""
    graph, profile = found.graph, found.profile
    whole = actckpt.price(graph, profile, actckpt.Plan("none"))
    budget = int(share * whole.peak_bytes)
    row: Row = {"model": name, "share": share, "ops": len(graph.ops), "budget_bytes": budget}
    begin, worked = time.perf_counter(), time.process_time()
    try:
        plan = actckpt.POLICIES["auto"](graph, profile, budget)
    except actckpt.BudgetError as error:
        row["smallest"] = (error.smallest_bytes or 0) / whole.peak_bytes
        plan = None
    row["solve_s"] = time.perf_counter() - begin
    row["solve_cpu_s"] = time.process_time() - worked
    begin = time.perf_counter()
    bound = actckpt.lower_bound(graph, profile, budget)
    row["bound_s"] = time.perf_counter() - begin
    row["bound"] = bound.overhead if bound.possible else None
    if plan is not None:
        price = actckpt.price(graph, profile, plan)
        row["overhead"] = price.time_s / whole.time_s - 1
        row["used"] = price.peak_bytes / budget
        row["by"] = "operations" if plan.bursts else "calls"
        row["following"] = price.following_s / whole.time_s
        row["gap"] = row["overhead"] - bound.overhead
        of_kind = bound.by_operations if plan.bursts else bound.by_calls
        row["bound_of_kind"] = of_kind
        row["gap_of_kind"] = row["overhead"] - of_kind
    return row


def layered(layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A GPT-2 of so many layers, narrow: the solvers see operations, not sizes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=512, n_positions=64, n_embd=128, n_layer=layers, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(512, (2, 64))
    return GPT2LMHeadModel(config).train(), {"input_ids": ids, "labels": ids}


# ---- the optimum of small graphs


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.inner(x)
        return x + inner


def _chain() -> list[nn.Module]:
    return [m for _ in range(6) for m in (nn.Linear(256, 256), nn.Tanh())]


def _wide_inside() -> list[nn.Module]:
    return [
        *(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.Sigmoid()),
        *(nn.Linear(256, 512), nn.Softplus(), nn.Linear(512, 256)),
    ]


def _activations() -> list[nn.Module]:
    return [nn.Linear(256, 256), nn.Tanh(), nn.Softplus(), nn.GELU(), nn.Sigmoid()]


def _residual() -> list[nn.Module]:
    blocks = (Residual(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)) for _ in range(2))
    return [*blocks]


# few operations, wide enough that following them costs next to nothing
SMALL: dict[str, Callable[[], list[nn.Module]]] = {
    "linear, tanh": _chain,
    "wide inside": _wide_inside,
    "activations": _activations,
    "residual": _residual,
}


def small(kind: str) -> Caught:
    """A graph small enough to try every plan."""
    torch.manual_seed(SEED)
    body = nn.Sequential(*SMALL[kind]())
    return caught(
        nn.Sequential(body, nn.Linear(256, 8)),
        torch.randn(4096, 256),
        loss_fn=lambda out: out.square().mean(),
    )


def small_rows() -> Iterator[Row]:
    """The planner against the optimum, from the smallest peak on."""
    for kind in SMALL:
        found = small(kind)
        graph, profile = found.graph, found.profile
        whole = actckpt.price(graph, profile, actckpt.Plan("none"))
        try:
            actckpt.exhaustive(graph, profile, 0)
        except actckpt.BudgetError as error:
            smallest = (error.smallest_bytes or 0) / whole.peak_bytes
        for part in (0.75, 0.5, 0.25, 0.0):
            row = row_of(kind, found, smallest + part * (1 - smallest) + 1e-9)
            best = actckpt.exhaustive(graph, profile, row["budget_bytes"])
            row["optimum"] = actckpt.price(graph, profile, best).time_s / whole.time_s - 1
            yield row


# ---- what is written


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def tables(rows: list[Row], sizes: list[Row], optima: list[Row]) -> list[str]:
    def line(row: Row) -> list[str]:
        overhead = row.get("overhead")
        refused = f"refused: {100 * row['smallest']:.0f} %" if "smallest" in row else ""
        return [
            row["model"],
            f"{100 * row['share']:.0f}",
            percent(overhead) if overhead is not None else refused,
            percent(row["bound"]),
            percent(row.get("gap")),
            percent(row.get("bound_of_kind")),
            percent(row.get("gap_of_kind")),
            percent(row.get("following")),
            percent(row.get("used")),
            row.get("by", ""),
            f"{row['solve_s']:.1f}",
            f"{row['solve_cpu_s']:.1f}",
            f"{row['bound_s']:.1f}",
        ]

    columns = ["", "budget, %", "overhead, %", "bound, %", "gap, points", "of its kind, %",
               "gap, points", "following, %", "used, %", "by", "solve, s", "of all cores, s",
               "bound, s"]  # fmt: skip
    grown = [[f"{r['layers']} layers", str(r["ops"]), *line(r)[1:]] for r in sizes]
    best = [
        [r["model"], f"{100 * r['share']:.0f}", percent(r.get("overhead")), percent(r["optimum"]),
         percent(r["bound"])]
        for r in optima
    ]  # fmt: skip
    return [
        "## Models",
        markdown_table(columns, [line(r) for r in rows]),
        "## Solvers on GPT-2, width 128, 2 x 64 tokens",
        markdown_table(["", "operations", *columns[1:]], grown),
        "## Small graphs, every plan tried",
        markdown_table(["", "budget, %", "overhead, %", "optimum, %", "bound, %"], best),
    ]


def draw(rows: list[Row], sizes: list[Row]) -> Figure:
    """Overhead above its bound for each model, and the solvers' seconds against operations."""
    figure = blank_figure(10.5, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
    for axes in (left, right):
        bare_axes(axes)
    names = list(dict.fromkeys(r["model"] for r in rows))
    for n, name in enumerate(names):
        for k, share in enumerate(SHARES):
            row = next((r for r in rows if r["model"] == name and r["share"] == share), None)
            if row is None or row.get("overhead") is None:
                continue
            x = n + (k - (len(SHARES) - 1) / 2) * 0.2
            low, high = 100 * (row["bound"] or 0.0), 100 * row["overhead"]
            left.plot([x, x], [low, high], color=OURS, linewidth=1.2, alpha=0.6)
            left.plot(x, low, marker="_", color=TORCH, markersize=8, linestyle="none")
            left.plot(x, 100 * row["bound_of_kind"], marker="_", color=INK, markersize=8,
                      linestyle="none")  # fmt: skip
            left.plot(x, high, marker="o", color=OURS, markersize=4, linestyle="none")
    left.set_xticks(range(len(names)), names, fontsize=8, color=INK)
    left.set_ylabel("predicted overhead, %", fontsize=9, color=MUTED)
    left.set_title(
        "plan (dot), bound of its kind (dark dash) and of all plans (dash) at 75, 50, 35, 25 % of "
        "the untouched activations",
        fontsize=9, loc="left", color=INK,
    )  # fmt: skip
    for share, color in zip((0.5, 0.3), (OURS, TORCH), strict=True):
        at = [r for r in sizes if r["share"] == share]
        right.plot([r["ops"] for r in at], [r["solve_s"] for r in at], color=color, marker="o",
                   markersize=4, label=f"plan at {100 * share:.0f} %")  # fmt: skip
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("operations in the step", fontsize=9, color=MUTED)
    right.set_ylabel("seconds", fontsize=9, color=MUTED)
    right.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.optimality", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small models, up to 24 layers; writes to runs/optimality",
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    layers = [n for n in LAYERS if n <= 24] if quick else list(LAYERS)
    rows: list[Row] = []
    sizes: list[Row] = []
    optima: list[Row] = []
    folder = Path("runs/optimality") if quick else FOLDER
    with progress(len(MODELS) + len(layers) + 1, "parts") as done:
        for name in MODELS:
            subject = built(name, quick=quick)
            found = caught(subject.model, subject.batch, **subject.loss)
            rows += [row_of(name, found, share) for share in SHARES]
            write(folder, rows, sizes, optima, quick=quick)
            done(f"{name}: gaps {', '.join(percent(r.get('gap')) for r in rows[-len(SHARES) :])}")
        for row in small_rows():
            optima.append(row)
        done("small chains")
        for count in layers:
            model, batch = layered(count)
            found = caught(model, batch)
            for share in (0.5, 0.3):
                sizes.append({**row_of("gpt2", found, share), "layers": count})
            write(folder, rows, sizes, optima, quick=quick)
            took = ", ".join(f"{r['solve_s']:.1f} s" for r in sizes[-2:])
            done(f"{count} layers: {took}")


def write(
    folder: Path, rows: list[Row], sizes: list[Row], optima: list[Row], *, quick: bool
) -> None:
    """What there is so far: a run that is stopped loses one part."""
    about = circumstances(
        {"torch": torch.__version__},
        seed=SEED,
        models="those of experiments.peers" + (", --quick sizes" if quick else ""),
        budgets="shares of the untouched step's activation peak",
        time="seconds by the clock, of the solvers on all cores; their processor time beside it",
    )
    write_json_lines("optimality", about, [*rows, *sizes, *optima], folder=folder)
    write_markdown(
        "optimality",
        about,
        "# How far from the optimum",
        "Predicted overhead of `auto`, the bound that no plan can beat, and the gap between them; "
        "then the bound that no plan of the same kind (by operations, or by calls) can beat, which "
        "counts what that kind pays for following the forward.",
        *tables(rows, sizes, optima),
        "![overheads and bounds](optimality.png)",
        folder=folder,
    )
    if sizes:
        draw(rows, sizes).savefig(folder / "optimality.png")


if __name__ == "__main__":
    main()
