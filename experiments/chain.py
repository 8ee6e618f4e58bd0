"""Live activations of a deep chain: O(n), O(sqrt n) and O(log n), measured, beside torch's own.

A chain of n equal Linear-Tanh-Dropout blocks, called from a loop over a ModuleList. The unit is
one activation (1 MiB); what a step adds to parameters, gradients and batch is counted in units.

    python -m experiments.chain
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import statistics
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import actckpt
from experiments.figure import INK, MUTED, OURS, TORCH, UNTOUCHED, bare_axes, blank_figure
from experiments.progress import progress
from experiments.results import circumstances, markdown_table, write_json_lines, write_markdown
from experiments.timing import interleaved, ratio

WIDTH = 64
BATCH = 4096
UNIT_BYTES = BATCH * WIDTH * 4
SEED = 0
DEPTHS = (16, 64, 256)
# the slow arms take n log n forwards: fewer rounds where a round is long
ROUNDS = {16: 15, 64: 9, 256: 5}

Drive = Callable[[nn.ModuleList, torch.Tensor], torch.Tensor]
Row = dict[str, Any]

PLAIN = ("untouched", "untouched again")
POLICIES = ("full", "sqrt", "log", "auto")
THEIRS = ("torch each block", "torch sequential", "torch nested")
ARMS = (*PLAIN, *POLICIES, *THEIRS)
WHAT = {
    "untouched": "no recomputation",
    "untouched again": "the same, to know the noise",
    "full": '`policy="full"`',
    "sqrt": '`policy="sqrt"`',
    "log": '`policy="log"`',
    "auto": '`policy="auto"` at the smallest budget it accepts',
    "torch each block": "`torch.utils.checkpoint` on every block",
    "torch sequential": "`checkpoint_sequential`, √n segments",
    "torch nested": "`torch.utils.checkpoint` on halves of halves",
}


class Chain(nn.Module):
    """``depth`` equal blocks, called one after the other by ``drive``."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.1)) for _ in range(depth)
        )
        self.drive: Drive = in_a_loop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drive(self.blocks, x)


def in_a_loop(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


def each_block(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def sequential(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    segments = round(math.sqrt(len(blocks)))
    out: torch.Tensor = checkpoint_sequential(list(blocks), segments, x, use_reentrant=False)
    return out


def nested(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """Each half is a checkpoint of two halves, down to single blocks."""
    if len(blocks) == 1:
        out: torch.Tensor = blocks[0](x)
        return out
    middle = len(blocks) // 2
    for half in (blocks[:middle], blocks[middle:]):
        x = checkpoint(nested, half, x, use_reentrant=False)
    return x


DRIVES: dict[str, Drive] = {
    "torch each block": each_block,
    "torch sequential": sequential,
    "torch nested": nested,
}


def loss_fn(out: torch.Tensor) -> torch.Tensor:
    return out.sum()


def prepared(chain: Chain, arm: str, batch: torch.Tensor) -> Chain:
    """A copy of the chain that recomputes as the arm says."""
    model = copy.deepcopy(chain)
    if arm in DRIVES:
        model.drive = DRIVES[arm]
    elif arm == "auto":
        smallest_gb = smallest(model, batch) / 1e9
        actckpt.optimize(model, smallest_gb, batch=batch, loss_fn=loss_fn, scope="activations")
    elif arm in POLICIES:
        actckpt.optimize(model, None, batch=batch, loss_fn=loss_fn, policy=arm)
    return model


def smallest(model: Chain, batch: torch.Tensor) -> int:
    """Bytes of the smallest budget that policy "auto" accepts: the error names it."""
    try:
        actckpt.optimize(model, 1e-9, batch=batch, loss_fn=loss_fn, scope="activations")
    except actckpt.BudgetError as error:
        return error.smallest_bytes or 0
    raise RuntimeError("a chain cannot be trained in one byte")


def rows_of(depth: int) -> tuple[dict[str, str], list[Row]]:
    """The versions, and a row for every arm at one depth."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    chain, batch = Chain(depth), torch.randn(BATCH, WIDTH)
    models = {arm: prepared(chain, arm, batch) for arm in ARMS}
    versions = actckpt.report(models["full"]).versions

    def step(model: Chain) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            loss_fn(model(batch)).backward()

        return run

    added = {
        arm: actckpt.measure(model, batch, loss_fn=loss_fn, steps=1).added_bytes
        for arm, model in models.items()
    }
    same = _same_gradients(models, {arm: step(model) for arm, model in models.items()})
    times = interleaved(
        {arm: step(model) for arm, model in models.items()},
        rounds=ROUNDS[depth],
        warmup=1,
        seed=SEED,
    )
    rows = []
    for arm in ARMS:
        slower = ratio(times[arm], times["untouched"])
        rows.append(
            {
                "depth": depth,
                "arm": arm,
                "added_bytes": added[arm],
                "units": added[arm] / UNIT_BYTES,
                "step_s": statistics.median(times[arm]),
                "ratio": slower.median,
                "ratio_low": slower.low,
                "ratio_high": slower.high,
                "same_gradients": same[arm],
                "times_s": times[arm],
            }
        )
    return versions, rows


def _same_gradients(
    models: dict[str, Chain], steps: dict[str, Callable[[], None]]
) -> dict[str, bool]:
    """Whether each arm's gradients are bitwise the untouched chain's, from the same seed."""
    found: dict[str, bool] = {}
    expected: list[torch.Tensor | None] = []
    for arm, model in models.items():
        torch.manual_seed(SEED)
        steps[arm]()
        grads = [p.grad for p in model.parameters()]
        expected = expected or grads
        found[arm] = all(
            a is not None and b is not None and torch.equal(a, b)
            for a, b in zip(grads, expected, strict=True)
        )
    return found


# ---- what is written


def table(rows: list[Row], depths: list[int]) -> str:
    at = {(row["arm"], row["depth"]): row for row in rows}
    columns = ["", *(f"n = {n}" for n in depths), *(f"time, n = {n}" for n in depths), "gradients"]
    lines = []
    for arm in ARMS:
        cells = [at[arm, n] for n in depths]
        same = all(cell["same_gradients"] for cell in cells)
        lines.append(
            [
                f"{arm}: {WHAT[arm]}",
                *(f"{cell['units']:.1f}" for cell in cells),
                *(f"{c['ratio']:.2f} ({c['ratio_low']:.2f}–{c['ratio_high']:.2f})" for c in cells),
                "equal" if same else "differ",
            ]
        )
    return markdown_table(columns, lines)


LOOKS = {
    "untouched": (UNTOUCHED, "-", "D"),
    "torch each block": (TORCH, "-", "s"),
    "torch sequential": (TORCH, "-", "o"),
    "torch nested": (TORCH, "-", "^"),
    "full": (OURS, "-", "s"),
    "sqrt": (OURS, "-", "o"),
    "log": (OURS, "-", "^"),
}


def draw(rows: list[Row], depths: list[int]) -> Figure:
    """Live units against n, both logarithmic, with the curves that the theory promises."""
    figure = blank_figure(7.4, 4.8)
    axes = figure.subplots()
    bare_axes(axes)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for arm, (color, line, marker) in LOOKS.items():
        units = [row["units"] for row in rows if row["arm"] == arm]
        axes.plot(
            depths,
            units,
            color=color,
            linestyle=line,
            marker=marker,
            # torch's lines wide and pale, to be seen beneath ours where they are the same
            markersize=10 if arm in DRIVES else 5.5,
            linewidth=5 if arm in DRIVES else 1.5,
            alpha=0.4 if arm in DRIVES else 1.0,
            markeredgecolor="white",
            markeredgewidth=0.0 if arm in DRIVES else 0.8,
            zorder=2 if arm in DRIVES else 3,
        )
    ends = {arm: next(r["units"] for r in reversed(rows) if r["arm"] == arm) for arm in LOOKS}
    for arm, height in _apart(ends).items():
        name = arm if arm in DRIVES or arm == "untouched" else f"actckpt {arm}"
        axes.annotate(
            f"{name}  {ends[arm]:.0f}",
            (depths[-1] * 1.1, height),
            va="center",
            fontsize=8,
            color=LOOKS[arm][0],
        )
    axes.set_xlim(depths[0] * 0.9, depths[-1] * 2.5)
    axes.set_xticks(depths, [str(n) for n in depths])
    ticks = [8, 16, 32, 64, 128, 256, 512, 1024]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("blocks in the chain, n", color=MUTED, fontsize=9)
    axes.set_title(
        "Activations alive at the peak of a training step, in units of one block's output",
        loc="left",
        fontsize=10,
        color=INK,
    )
    return figure


def _apart(heights: dict[str, float], factor: float = 1.21) -> dict[str, float]:
    """The heights, moved so that neighbours differ by ``factor`` at least."""
    names = sorted(heights, key=lambda name: heights[name])
    moved = [heights[name] for name in names]
    for _ in range(100):
        for i in range(len(moved) - 1):
            if moved[i + 1] < moved[i] * factor:
                middle = math.sqrt(moved[i] * moved[i + 1])
                moved[i], moved[i + 1] = middle / factor**0.505, middle * factor**0.505
    return dict(zip(names, moved, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.chain", description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, choices=DEPTHS)
    depths = sorted(set(parser.parse_args().depths))
    rows: list[Row] = []
    versions: dict[str, str] = {}
    fresh = multiprocessing.get_context("spawn")
    with progress(len(depths), "chain") as done, fresh.Pool(1, maxtasksperchild=1) as pool:
        for environment, found in pool.imap(rows_of, depths):
            versions |= environment
            rows.extend(found)
            done(
                f"n = {found[0]['depth']}: "
                + ", ".join(f"{r['arm']} {r['units']:.1f} ({r['ratio']:.2f}x)" for r in found)
            )
    about = circumstances(
        versions,
        seed=SEED,
        rounds={n: ROUNDS[n] for n in depths},
        model=f"n x (Linear {WIDTH}, Tanh, Dropout 0.1), batch {BATCH}, float32, loss: sum",
        time="processor time of one thread, arms interleaved, over untouched: median "
        "(and quartiles) of the ratios round by round",
    )
    write_json_lines("chain", about, rows)
    write_markdown(
        "chain",
        about,
        "# Live activations of a chain of n blocks",
        "Peak of what a step adds to parameters, gradients and batch, in units of one activation "
        f"({UNIT_BYTES / 2**20:g} MiB), and step time over the untouched chain's.",
        table(rows, depths),
        "![live units against n](chain.png)",
    )
    draw(rows, depths).savefig("experiments/results/chain.png")


if __name__ == "__main__":
    main()
