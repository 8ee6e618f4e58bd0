"""Against torch.utils.checkpoint on every block: the same regions, and the same peak.

For each model the blocks of policy "full" are recomputed once by torch's function and once by
actckpt; then actckpt plans freely with torch's own measured peak as the budget.

    python -m experiments.versus_checkpoint
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.checkpoint import checkpoint

import actckpt
from experiments.figure import INK, MUTED, OURS, TORCH, UNTOUCHED, bare_axes, blank_figure
from experiments.progress import progress
from experiments.results import circumstances, markdown_table, write_json_lines, write_markdown
from experiments.timing import interleaved, ratio
from tests.suite import CASES, call

SEED = 0
ROUNDS = 15

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """How many of the suite's batches make one here, so that operations outweigh Python.

    Args:
        labels: shape of the labels of one batch and how many classes there are, where the suite's
            loss closes over them: here they are given, so that every meter counts them.
    """

    batches: int
    labels: tuple[tuple[int, ...], int] | None = None

    def target(self) -> torch.Tensor | None:
        if self.labels is None:
            return None
        (batch, *rest), classes = self.labels
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(classes, (batch * self.batches, *rest), generator=generator)


SIZES = {
    "gpt2": Size(2),
    "llama": Size(2),
    "bert": Size(1),
    "vit": Size(3),
    "resnet": Size(3),
    "t5": Size(3),
    "mixtral": Size(2),
    "mlp64": Size(4),
    "unet": Size(4, ((8, 64, 64), 4)),
    "densenet": Size(3, ((16,), 10)),
}

ARMS = ("untouched", "untouched again", "torch", "torch again", "full", "auto")
WHAT = {
    "untouched": "untouched",
    "torch": "torch.utils.checkpoint",
    "full": "actckpt full",
    "auto": "actckpt auto at torch's peak",
}


class Checkpointed:
    """A module's forward, some of whose calls in a step are under torch's function.

    Args:
        chosen: numbers of the calls to checkpoint, counted within one step.
        calls: how many calls a step makes.
    """

    def __init__(self, module: nn.Module, chosen: set[int], calls: int) -> None:
        self.forward = module.forward
        self.chosen = chosen
        self.calls = calls
        self.number = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        number = self.number % self.calls
        self.number += 1
        if number not in self.chosen:
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def checkpointed(model: nn.Module, plan: actckpt.Plan, graph: actckpt.Graph) -> nn.Module:
    """The model with torch's function around the plan's regions, changed in place."""
    calls = Counter(stage.path for stage in graph.stages)
    chosen: dict[str, set[int]] = {}
    for region in plan.regions:
        assert region.first == region.last
        path, number = region.first
        chosen.setdefault(path, set()).add(number)
    for path, numbers in chosen.items():
        module = model.get_submodule(path)
        module.forward = Checkpointed(module, numbers, calls[path])
    return model


def row_of(name: str) -> tuple[dict[str, str], Row]:
    """The versions, and everything measured for one model."""
    torch.set_num_threads(1)
    case, size = CASES[name], SIZES[name]
    model = case.build()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            # torch's function would fill the key-value cache a second time in the replay
            config.use_cache = False
    batch = repeated(case.batch(), size.batches)
    target = size.target()
    loss_fn: Callable[..., Any] | None = case.loss_fn if target is None else cross_entropy
    loss: dict[str, Any] = {"loss_fn": loss_fn, "target": target}
    graph = actckpt.trace(model, batch, **loss)
    full = actckpt.optimize(copy.deepcopy(model), None, batch=batch, **loss, policy="full")
    report = actckpt.report(full)

    models: dict[str, nn.Module] = {
        "untouched": model,
        "untouched again": copy.deepcopy(model),
        "torch": checkpointed(copy.deepcopy(model), report.plan, graph),
        "torch again": checkpointed(copy.deepcopy(model), report.plan, graph),
        "full": full,
    }

    def measured(arm: str) -> actckpt.Measurement:
        return actckpt.measure(models[arm], batch, **loss, steps=1)

    peaks = {arm: measured(arm).peak_bytes for arm in ("untouched", "torch", "full")}
    budget_bytes = peaks["torch"]
    refused = False
    try:
        models["auto"] = planned(model, budget_bytes, batch, loss)
    except actckpt.BudgetError as error:
        if error.smallest_bytes is None:
            raise
        refused, budget_bytes = True, error.smallest_bytes
        models["auto"] = planned(model, budget_bytes, batch, loss)
    peaks["auto"] = measured("auto").peak_bytes
    plan = actckpt.report(models["auto"]).plan

    def step(arm: str) -> Callable[[], None]:
        def run() -> None:
            models[arm].zero_grad(set_to_none=True)
            output = call(models[arm], batch)
            if loss_fn is None:
                output["loss"].backward()
            else:
                (loss_fn(output) if target is None else loss_fn(output, target)).backward()

        return run

    steps = {arm: step(arm) for arm in ARMS}
    same = _same_gradients(models, steps)
    times = interleaved(steps, rounds=ROUNDS, seed=SEED)

    def compared(arm: str, to: str) -> dict[str, float]:
        found = ratio(times[arm], times[to])
        return {"median": found.median, "low": found.low, "high": found.high}

    return report.versions, {
        "model": name,
        "batches": size.batches,
        "blocks": [region.label for region in report.plan.regions],
        "auto_regions": [region.label for region in plan.walk()],
        "auto_saved_ops": sum(len(region.saved) for region in plan.walk()),
        "auto_budget_bytes": budget_bytes,
        "auto_refused": refused,
        "peak_bytes": peaks,
        "step_s": {arm: statistics.median(times[arm]) for arm in ARMS},
        "over_untouched": {arm: compared(arm, "untouched") for arm in ARMS},
        "over_torch": {arm: compared(arm, "torch") for arm in ("torch again", "full", "auto")},
        "same_gradients": same,
        "times_s": times,
    }


def planned(model: nn.Module, budget_bytes: int, batch: Any, loss: Mapping[str, Any]) -> nn.Module:
    """A copy with the fastest plan within a budget."""
    return actckpt.optimize(copy.deepcopy(model), budget_bytes / 1e9, batch=batch, **loss)


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy; classes are dimension 1."""
    return nn.functional.cross_entropy(output, target)


def repeated(batch: Any, times: int) -> Any:
    """A batch ``times`` as long: every tensor after itself along its first dimension."""
    if isinstance(batch, torch.Tensor):
        return torch.cat([batch] * times)
    if isinstance(batch, Mapping):
        return {key: repeated(value, times) for key, value in batch.items()}
    return tuple(repeated(v, times) for v in batch) if isinstance(batch, tuple) else batch


def _same_gradients(
    models: dict[str, nn.Module], steps: dict[str, Callable[[], None]]
) -> dict[str, bool]:
    """Whether each arm's gradients are bitwise the untouched model's, from the same seed."""
    found: dict[str, bool] = {}
    expected: list[torch.Tensor | None] | None = None
    for arm in ARMS:
        torch.manual_seed(SEED)
        steps[arm]()
        grads = [p.grad for p in models[arm].parameters()]
        if expected is None:
            expected = grads
        found[arm] = all(
            a is b if a is None or b is None else torch.equal(a, b)
            for a, b in zip(grads, expected, strict=True)
        )
    return found


# ---- what is written


def tables(rows: list[Row]) -> list[str]:
    peaks, times, against = [], [], []
    for row in rows:
        peak, over, torchs = row["peak_bytes"], row["over_untouched"], row["over_torch"]
        whole = peak["untouched"]
        same = all(row["same_gradients"].values())
        peaks.append(
            [
                row["model"],
                f"{whole / 1e6:.1f}",
                *(f"{peak[arm] / whole:.3f}" for arm in ("torch", "full", "auto")),
                f"{peak['full'] / peak['torch']:.3f}",
                f"{peak['auto'] / peak['torch']:.3f}" + (" refused" if row["auto_refused"] else ""),
                "equal"
                if same
                else ", ".join(a for a, ok in row["same_gradients"].items() if not ok),
            ]
        )
        times.append(
            [
                row["model"],
                f"{1e3 * row['step_s']['untouched']:.0f}",
                *(_shown(over[arm]) for arm in ("untouched again", "torch", "full", "auto")),
            ]
        )
        against.append(
            [row["model"], *(_shown(torchs[arm]) for arm in ("torch again", "full", "auto"))]
        )
    return [
        "## Peak, over the untouched one",
        markdown_table(
            ["", "untouched, MB", "torch", "full", "auto", "full / torch", "auto / torch",
             "gradients"],
            peaks,
        ),
        "## Step time, over the untouched one",
        markdown_table(
            ["", "untouched, ms", "untouched again", "torch", "full", "auto"], times
        ),
        "## Step time, over torch's",
        markdown_table(["", "torch again", "full", "auto"], against),
    ]  # fmt: skip


def _shown(found: dict[str, float]) -> str:
    return f"{found['median']:.3f} ({found['low']:.3f}–{found['high']:.3f})"


LOOKS = {
    "untouched": (UNTOUCHED, "D", UNTOUCHED),
    "torch": (TORCH, "s", TORCH),
    "full": (OURS, "o", "none"),
    "auto": (OURS, "o", OURS),
}


def draw(rows: list[Row]) -> Figure:
    """Peak against step time, a panel for each model; lower left is better."""
    columns = min(5, len(rows))
    lines = -(-len(rows) // columns)
    figure = blank_figure(2.15 * columns + 0.5, 2.1 * lines + 0.7)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    panels = list(grid.flat)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(panels, rows, strict=False):
        bare_axes(axes)
        whole = row["peak_bytes"]["untouched"]
        torchs = 100 * row["peak_bytes"]["torch"] / whole
        # what torch needs of both: ours are to lie in the lower left corner
        axes.axvline(torchs, color=TORCH, linewidth=0.9, linestyle=":", zorder=1)
        slower = row["over_untouched"]["torch"]["median"]
        axes.axhline(slower, color=TORCH, linewidth=0.9, linestyle=":", zorder=1)
        for arm, (color, marker, face) in LOOKS.items():
            over = row["over_untouched"][arm]
            axes.errorbar(
                100 * row["peak_bytes"][arm] / whole,
                over["median"],
                yerr=[
                    [max(0.0, over["median"] - over["low"])],
                    [max(0.0, over["high"] - over["median"])],
                ],
                color=color,
                marker=marker,
                markersize=6 if arm != "full" else 7.5,
                markerfacecolor=face,
                markeredgecolor=color,
                elinewidth=1,
                linestyle="none",
                label=WHAT[arm],
                zorder=3 if color == OURS else 2,
            )
        axes.set_title(row["model"], loc="left", fontsize=9, color=INK)
        axes.set_xlim(0, 108)
    figure.supxlabel("measured peak, % of the untouched one", fontsize=9, color=MUTED)
    figure.supylabel("step time over the untouched one", fontsize=9, color=MUTED)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=len(labels),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.versus_checkpoint", description=__doc__
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(SIZES)}")
    names = parser.parse_args().models or list(SIZES)
    if unknown := [name for name in names if name not in SIZES]:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(SIZES)}")
    rows: list[Row] = []
    versions: dict[str, str] = {}
    fresh = multiprocessing.get_context("spawn")
    with progress(len(names), "models") as done, fresh.Pool(1, maxtasksperchild=1) as pool:
        for environment, row in pool.imap(row_of, names):
            versions |= environment
            rows.append(row)
            peak, torchs = row["peak_bytes"], row["over_torch"]
            done(
                f"{row['model']}: over torch: full {peak['full'] / peak['torch']:.3f} of the peak, "
                f"{torchs['full']['median']:.3f} of the time; auto "
                f"{peak['auto'] / peak['torch']:.3f}, {torchs['auto']['median']:.3f}; "
                f"torch again {torchs['torch again']['median']:.3f}"
            )
    about = circumstances(
        versions,
        seed=SEED,
        rounds=ROUNDS,
        models="tests/suite.py, batch times "
        + ", ".join(f"{name} {SIZES[name].batches}" for name in names)
        + "; no key-value cache, no optimizer",
        peak="allocated bytes over a whole step, parameters and gradients included",
        time="processor time of one thread, arms interleaved: median (and quartiles) of the "
        "ratios round by round; 'again' is the same arm twice, to know the noise",
    )
    write_json_lines("versus_checkpoint", about, rows)
    write_markdown(
        "versus_checkpoint",
        about,
        "# Against torch.utils.checkpoint on every block",
        "torch: `torch.utils.checkpoint` (`use_reentrant=False`) on every block; full: "
        '`policy="full"`, the same blocks; auto: `policy="auto"` with torch\'s measured peak as '
        "the budget, or the smallest it accepts where it refuses that one.",
        *tables(rows),
        "![peak against time](versus_checkpoint.png)",
    )
    draw(rows).savefig("experiments/results/versus_checkpoint.png")


if __name__ == "__main__":
    main()
