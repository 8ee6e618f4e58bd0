"""The same training without a budget, under a loose and a tight one, and killed and resumed."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import actckpt
from actckpt.demo.figure import draw_demo
from actckpt.demo.killed import BATCH_SIZE, LEARNING_RATE, Killed, kill_and_resume
from actckpt.demo.model import GPT, GPTConfig, next_byte_loss
from actckpt.demo.text import draw_batch, standard_library_text

LOOSE, TIGHT = 0.60, 0.36
# the first steps fill caches and allocator
WARM_UP_STEPS = 2


@dataclass(slots=True)
class Arm:
    """One of the three trainings."""

    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    budget_gb: float | None = None
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    measurement: actckpt.Measurement | None = None

    def step(self, batch: tuple[torch.Tensor, torch.Tensor], seed: int) -> None:
        """Train one step; every arm draws the same dropout masks."""
        ids, target = batch
        torch.manual_seed(seed)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = next_byte_loss(self.model(ids), target)
        loss.backward()
        self.optimizer.step()
        self.step_s.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def measure(self, batch: tuple[torch.Tensor, torch.Tensor]) -> actckpt.Measurement:
        """Measure a step of this arm, which stays as it is."""
        ids, target = batch
        self.measurement = actckpt.measure(
            self.model,
            ids,
            loss_fn=next_byte_loss,
            target=target,
            optimizer=self.optimizer,
            steps=2,
        )
        return self.measurement

    def plan(self, budget_gb: float, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Plan this arm for a budget, or for the smallest that can be met if that is more."""
        ids, target = batch
        self.budget_gb = budget_gb
        try:
            self._optimize(ids, target)
        except actckpt.BudgetError as error:
            if error.smallest_bytes is None:
                raise
            self.budget_gb = error.smallest_bytes / 1e9
            self._optimize(ids, target)

    def _optimize(self, ids: torch.Tensor, target: torch.Tensor) -> None:
        actckpt.optimize(
            self.model,
            self.budget_gb,
            batch=ids,
            loss_fn=next_byte_loss,
            target=target,
            optimizer=self.optimizer,
        )


def run_demo(*, steps: int, seed: int, out: Path) -> int:
    """0 if all arms agree to the last bit and stay within their budgets, else 1.

    Args:
        steps: how many each arm trains.
        out: folder for ``demo.json``, ``demo.png`` and each plan's report.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    started = time.perf_counter()
    config = GPTConfig()
    text = standard_library_text()
    arms = [_make_arm(name, config, seed) for name in ("no budget", "loose", "tight")]
    plain = arms[0]
    batch = draw_batch(text, BATCH_SIZE, config.context, seed)
    size = sum(p.numel() for p in plain.model.parameters())
    console.print(
        f"byte-level GPT: {config.layers} layers of width {config.width}, {size / 1e6:.2f} M "
        f"parameters, batch {BATCH_SIZE} × {config.context}, AdamW, dropout {config.dropout}\n"
        f"text: the Python standard library's sources, {len(text) / 1e6:.1f} MB\n"
    )

    for arm in arms:
        arm.measure(batch)
    assert plain.measurement is not None
    untouched_gb = plain.measurement.peak_bytes / 1e9
    console.print(f"no budget: {1000 * untouched_gb:.1f} MB measured")
    for arm, share in zip(arms[1:], (LOOSE, TIGHT), strict=True):
        arm.plan(share * untouched_gb, batch)
        assert arm.budget_gb is not None
        found = actckpt.report(arm.model)
        console.print(
            f"{arm.name}: budget {1000 * arm.budget_gb:.1f} MB "
            f"({100 * arm.budget_gb / untouched_gb:.0f} %), planned "
            f"{found.planned.predicted.peak_bytes / 1e6:.1f} MB, "
            f"{len(found.regions)} regions, predicted time {100 * found.overhead:+.1f} %"
        )

    console.print()
    _train(arms, text, config, steps=steps, seed=seed, console=console)
    for arm in arms[1:]:
        arm.measure(batch)
    failures = _failures(arms)
    _print_table(console, arms)
    tight = arms[-1]
    assert tight.budget_gb is not None
    killed = kill_and_resume(
        out / "killed", tight.losses, budget_gb=tight.budget_gb, seed=seed, console=console
    )
    failures += killed.failures

    results = _results(arms, config, killed, steps=steps, seed=seed, failures=failures)
    results["seconds"] = round(time.perf_counter() - started, 1)
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for arm in arms[1:]:
        for suffix in (".json", ".txt", ".png"):
            actckpt.report(arm.model).save(out / f"report-{arm.name}{suffix}")
    draw_demo(results["arms"]).savefig(out / "demo.png")
    for failure in failures:
        console.print(f"FAILED: {failure}", style="bold red")
    if not failures:
        console.print(
            f"losses of all {steps} steps and final weights: equal to the last bit; "
            "measured peaks: within their budgets"
        )
    console.print(f"wrote {out}/demo.json, demo.png and the reports; {results['seconds']:.0f} s")
    return 1 if failures else 0


def _make_arm(name: str, config: GPTConfig, seed: int) -> Arm:
    torch.manual_seed(seed)
    model = GPT(config)
    return Arm(name, model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))


def _train(
    arms: list[Arm],
    text: torch.Tensor,
    config: GPTConfig,
    *,
    steps: int,
    seed: int,
    console: Console,
) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console.print("step   " + "   ".join(f"{arm.name:>11}" for arm in arms) + "   loss, nats/byte")
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            batch = draw_batch(text, BATCH_SIZE, config.context, seed + 1 + step)
            # the order rotates, so that no arm always runs behind the same other one; an arm with
            # a plan begins, for an untouched twin looks like a copy that is trained in its place
            for i in range(len(arms)):
                arms[(step + i + 1) % len(arms)].step(batch, seed + 1 + step)
            losses = [arm.losses[-1] for arm in arms]
            verdict = "equal" if len(set(losses)) == 1 else "DIFFERENT"
            progress.console.print(
                f"{step + 1:4d}   " + "   ".join(f"{x:11.8f}" for x in losses) + f"   {verdict}"
            )
            progress.advance(task)
    console.print()


def _ratio(arm: Arm, plain: Arm) -> float:
    """Median over the steps of this arm's time over that of ``plain`` in the same round."""
    pairs = list(zip(arm.step_s, plain.step_s, strict=True))
    return median(a / b for a, b in pairs[WARM_UP_STEPS:] or pairs)


def _failures(arms: list[Arm]) -> list[str]:
    failures = []
    plain = arms[0]
    reference = plain.model.state_dict()
    for arm in arms[1:]:
        if arm.losses != plain.losses:
            failures.append(f"{arm.name}: losses differ from the training without a budget")
        weights = arm.model.state_dict()
        if not all(torch.equal(weights[key], reference[key]) for key in reference):
            failures.append(f"{arm.name}: final weights differ from those without a budget")
        assert arm.measurement is not None
        assert arm.budget_gb is not None
        if arm.measurement.peak_bytes > arm.budget_gb * 1e9:
            failures.append(
                f"{arm.name}: measured peak {arm.measurement.peak_bytes / 1e6:.1f} MB is above "
                f"the budget of {1000 * arm.budget_gb:.1f} MB"
            )
    return failures


def _print_table(console: Console, arms: list[Arm]) -> None:
    console.print(
        f"{'':10}{'budget':>12}{'measured peak':>16}{'of budget':>12}{'step':>11}{'time':>10}"
    )
    for arm in arms:
        assert arm.measurement is not None
        peak_gb = arm.measurement.peak_bytes / 1e9
        budget = "" if arm.budget_gb is None else f"{1000 * arm.budget_gb:.1f} MB"
        used = "" if arm.budget_gb is None else f"{100 * peak_gb / arm.budget_gb:.1f} %"
        step_ms = 1000 * median(arm.step_s[WARM_UP_STEPS:] or arm.step_s)
        console.print(
            f"{arm.name:10}{budget:>12}{f'{1000 * peak_gb:.1f} MB':>16}{used:>12}"
            f"{f'{step_ms:.0f} ms':>11}{f'{_ratio(arm, arms[0]):.3f} ×':>10}"
        )
    console.print()


def _results(
    arms: list[Arm],
    config: GPTConfig,
    killed: Killed,
    *,
    steps: int,
    seed: int,
    failures: list[str],
) -> dict[str, Any]:
    found = actckpt.report(arms[1].model)
    return {
        "command": f"actckpt demo --steps {steps} --seed {seed}",
        "config": {
            **asdict(config),
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "optimizer": "AdamW",
        },
        "versions": found.versions,
        "device": found.device,
        "failures": failures,
        "killed": asdict(killed),
        "arms": [
            {
                "name": arm.name,
                "budget_bytes": None if arm.budget_gb is None else round(arm.budget_gb * 1e9),
                "peak_bytes": arm.measurement.peak_bytes if arm.measurement else None,
                "split": arm.measurement.split if arm.measurement else None,
                "time_ratio": _ratio(arm, arms[0]),
                "median_step_s": median(arm.step_s[WARM_UP_STEPS:] or arm.step_s),
                "step_s": arm.step_s,
                "losses": arm.losses,
            }
            for arm in arms
        ],
    }
