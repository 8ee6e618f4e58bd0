"""One optimizer on a small model, untouched and planned: bits, peak, and what was planned for."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import actckpt
from experiments.optimizer_zoo import WAYS, Advance, Make, batch, loss, model, several, usual
from tests.loop_peaks import loop_peak, other_bits, weights

STEPS, SHARE = 4, 0.9
# for those that change nothing in their first steps
MORE_STEPS = 8

LEFT_OUT = "left out, and said"

Row = dict[str, Any]


class Trial:
    """A model and its optimizer, stepped one way."""

    def __init__(self, make: Make, advance: Advance) -> None:
        self.model = model()
        self.optimizer = make(self.model)
        self.advance = advance
        for o in several(self.optimizer):
            if callable(getattr(o, "train", None)):
                o.train()

    def step(self, seed: int) -> None:
        """One step of the loop; what draws random numbers draws the same each time."""
        torch.manual_seed(seed)
        self.advance(self.model, self.optimizer, seed)

    def run(self, steps: int) -> list[dict[str, torch.Tensor]]:
        """Weights after each step."""
        found = []
        for seed in range(steps):
            self.step(seed)
            found.append(weights([self.model]))
        return found

    def peak_bytes(self) -> int:
        """Of a further step, by the allocator."""
        held = [vars(o) for o in several(self.optimizer)]
        return loop_peak(lambda: self.step(STEPS), self.model, *held)


def run(name: str, make: Make) -> Row:
    """What became of one optimizer."""
    row: Row = {"name": name}
    reasons = []
    for way, (grouped, advance) in WAYS.items():
        grouped_make = grouped(make)
        try:
            untouched = Trial(grouped_make, advance)
            expected = untouched.run(STEPS)
            if not _moves(expected):
                untouched = Trial(grouped_make, advance)
                expected = untouched.run(MORE_STEPS)
        except Exception as error:  # anybody's code, stepped in a way that it may not be meant for
            reasons.append(f"{way}: {_one_line(error)}")
            continue
        if not _moves(expected):
            reasons.append(f"{way}: nothing is trained")
            continue
        if not all(t.isfinite().all() for t in expected[-1].values()):
            reasons.append(f"{way}: not finite")
            continue
        if any(map(other_bits, expected, Trial(grouped_make, advance).run(len(expected)))):
            reasons.append(f"{way}: other bits in a second run")
            continue
        row["way"] = way
        row["untouched_bytes"] = untouched.peak_bytes()
        row |= _planned(grouped_make, advance, expected, row["untouched_bytes"])
        if advance is usual:
            row["given"] = _given(grouped_make, row["budget_bytes"])
        return row
    return row | {"outcome": "no trial", "reason": "; ".join(dict.fromkeys(reasons))[:300]}


def _moves(found: Sequence[dict[str, torch.Tensor]]) -> bool:
    """Whether any of the steps changes the weights."""
    return any(other_bits(a, b) for a, b in itertools.pairwise(found))


def _planned(
    make: Make, advance: Advance, expected: list[dict[str, torch.Tensor]], untouched_bytes: int
) -> Row:
    """The optimizer learned from the loop, under a budget that can be met."""
    budget = int(SHARE * untouched_bytes)
    row: Row = {}
    for _ in range(3):
        trial = Trial(make, advance)
        row["budget_bytes"] = budget
        with _log() as said:
            try:
                actckpt.optimize(trial.model, budget / 1e9)
                found = trial.run(len(expected))
                row["peak_bytes"] = trial.peak_bytes()
            except actckpt.BudgetError as error:
                row["least_bytes"] = budget = error.smallest_bytes or untouched_bytes
                continue
            except Exception as error:  # what this experiment looks for
                return row | {"outcome": "error", "reason": _one_line(error)}
        bitwise = not any(map(other_bits, expected, found))
        report = actckpt.report(trial.model)
        row["bitwise"] = bitwise
        row["said"] = [line for line in said if "planning again" not in line]
        row["planned"] = _how(row["said"])
        row["recomputes"] = bool(report.plan.regions or report.plan.bursts)
        row["outcome"] = "trained"
        return row
    return row | {"outcome": "error", "reason": "no budget is enough"}


def _given(make: Make, budget_bytes: int) -> str:
    """Nothing if the optimizer can be given before its first step, or its budget is refused."""
    trial = Trial(make, usual)
    try:
        with _log():
            actckpt.optimize(
                trial.model,
                1.5 * budget_bytes / 1e9,
                batch=batch(0),
                loss_fn=loss,
                optimizer=trial.optimizer,
            )
        trial.step(0)
        trial.step(1)
    except Exception as error:  # what this experiment looks for
        return _one_line(error)
    return ""


def _how(said: Sequence[str]) -> str:
    """What was planned for, as the log says."""
    if any("not bounded" in line for line in said):
        return LEFT_OUT
    return "measured" if any("cannot be planned ahead" in line for line in said) else "traced"


@contextmanager
def _log() -> Iterator[list[str]]:
    """The lines that actckpt logs meanwhile, in place of printing them."""
    lines: list[str] = []

    class Listed(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("actckpt"), Listed()
    level, passed = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passed


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.160}"
