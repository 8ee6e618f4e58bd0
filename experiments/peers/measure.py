"""One model and one group of peers in a process of its own: peaks, times, gradients."""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import actckpt
from experiments.peers.arms import PEERS
from experiments.peers.checkpointing import NotApplicable
from experiments.peers.meter import measured_peak
from experiments.peers.models import SEED, built
from experiments.peers.ours import Plan, Planner
from experiments.peers.subject import Subject
from experiments.timing import interleaved, ratio

Row = dict[str, Any]
UNTOUCHED, AGAIN = "untouched", "untouched again"


@dataclass(frozen=True, slots=True)
class Case:
    """What one process measures.

    Args:
        peers: names, of one group.
        rounds: timed rounds of all arms.
        peaks_only: no plans at the peers' times, each of which takes several plans to find.
    """

    model: str
    peers: tuple[str, ...]
    quick: bool
    rounds: int
    peaks_only: bool = False


@dataclass(slots=True)
class Arm:
    """A way to run the step, and what its first step and its meter said."""

    run: Callable[[], None]
    gradients: float | None = 0.0
    buffers: float | None = 0.0
    peak_bytes: int = 0
    whole_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Reference:
    """Gradients and buffers of the untouched model after its first step."""

    gradients: tuple[torch.Tensor | None, ...]
    buffers: tuple[torch.Tensor, ...]


def rows_of(case: Case) -> tuple[dict[str, str], list[Row]]:
    """The versions, and a row for every peer of the case."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    subject = built(case.model, quick=case.quick)
    arms: dict[str, Arm] = {}
    first: Reference | None = None
    for name in (UNTOUCHED, AGAIN):
        model = copy.deepcopy(subject.model)
        arm, seen = _tried(subject, model, model, first)
        arms[name], first = arm, first or seen
    assert first is not None
    status: dict[str, str] = {}
    prepare_s: dict[str, float] = {}
    for name in case.peers:
        model = copy.deepcopy(subject.model)
        begin = time.perf_counter()
        status[name] = _attempt(arms, name, subject, model, first)
        prepare_s[name] = time.perf_counter() - begin
    peers = [name for name in case.peers if name in arms]
    # gradients that have not arrived count in a budget: with all of them it bounds nothing
    planner = Planner(subject, 2 * arms[UNTOUCHED].whole_bytes)

    def peak_of(plan: Plan) -> int:
        if plan.name not in arms:
            arms[plan.name], _ = _tried(subject, plan.model, plan.model, first)
        return arms[plan.name].peak_bytes

    at_peak: dict[str, Plan | str] = {}
    at_time: dict[str, Plan | str] = {}
    if peers:
        beside = {name: arms[name].run for name in (UNTOUCHED, *peers)}
        hasty = interleaved(beside, rounds=max(3, case.rounds // 2), warmup=1, seed=SEED)
        # from the smallest peak up, so that a plan can serve the next peer too
        for name in sorted(peers, key=lambda n: arms[n].peak_bytes):
            at_peak[name] = _planned(planner.filling, arms[name].peak_bytes, peak_of)
        for name in peers:
            slower = ratio(hasty[name], hasty[UNTOUCHED]).median
            at_time[name] = "not asked" if case.peaks_only else _planned(planner.no_slower, slower)
    used = {p.name: p for p in (*at_peak.values(), *at_time.values()) if isinstance(p, Plan)}
    for name, plan in used.items():
        try:
            peak_of(plan)
        except Exception as error:
            status[name] = _failed(error)
    timed = {name: arms[name].run for name in (UNTOUCHED, AGAIN, *peers, *used) if name in arms}
    times = interleaved(timed, rounds=case.rounds, warmup=1, seed=SEED)

    def over(name: str, other: str) -> dict[str, float]:
        found = ratio(times[name], times[other])
        return {"median": found.median, "low": found.low, "high": found.high}

    def measured(name: str) -> Row:
        arm = arms[name]
        return {
            "peak_bytes": arm.peak_bytes,
            "whole_bytes": arm.whole_bytes,
            "over_untouched": over(name, UNTOUCHED),
            "gradients": arm.gradients,
            "buffers": arm.buffers,
            "times_s": times[name],
        }

    def ours(plan: Plan | str, peer: str) -> Row:
        if isinstance(plan, str):
            return {"status": plan}
        if plan.name not in arms:
            return {"status": status[plan.name], **plan.row()}
        row = {"status": "measured", **plan.row(), **measured(plan.name)}
        row["refused"] = arms[peer].peak_bytes < planner.smallest_bytes
        row["over_peer"] = over(plan.name, peer)
        return row

    common = {
        "model": case.model,
        "what": subject.what,
        "quick": case.quick,
        "rounds": case.rounds,
        "untouched_bytes": arms[UNTOUCHED].peak_bytes,
        "untouched_whole_bytes": arms[UNTOUCHED].whole_bytes,
        "untouched_s": statistics.median(times[UNTOUCHED]),
        "again_over_untouched": over(AGAIN, UNTOUCHED),
        "again_gradients": arms[AGAIN].gradients,
    }
    rows = []
    for name in case.peers:
        row: Row = {**common, "peer": name, "group": PEERS[name].group, "status": status[name]}
        if name in arms:
            row |= {
                "prepare_s": prepare_s[name],
                **measured(name),
                "ours_at_its_peak": ours(at_peak[name], name),
                "ours_at_its_time": ours(at_time[name], name),
            }
        rows.append(row)
    return _versions(planner), rows


def _attempt(
    arms: dict[str, Arm], name: str, subject: Subject, model: nn.Module, first: Reference
) -> str:
    """Adds the peer's arm; says what came of it."""
    try:
        runs = PEERS[name].prepare(subject, model)
        arms[name], _ = _tried(subject, model, runs, first)
    except NotApplicable as reason:
        return f"not run: {reason}"
    except Exception as error:  # whatever a peer raises is a result
        return _failed(error)
    return "measured"


def _planned(plan: Callable[..., Plan], *arguments: Any) -> Plan | str:
    """The plan, or what went wrong."""
    try:
        return plan(*arguments)
    except Exception as error:
        return _failed(error)


def _failed(error: BaseException) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _tried(
    subject: Subject, model: nn.Module, runs: nn.Module, first: Reference | None
) -> tuple[Arm, Reference]:
    """The arm after its first step, which is compared, and a later one, which is metered.

    Args:
        model: holds the parameters and buffers.
        runs: what is called.
    """
    parameters, buffers = tuple(model.parameters()), tuple(model.buffers())
    arm = Arm(subject.step(runs))
    torch.manual_seed(SEED)
    arm.run()
    seen = Reference(
        tuple(None if p.grad is None else p.grad.clone() for p in parameters),
        tuple(b.clone() for b in buffers),
    )
    if first is not None:
        arm.gradients = _compared(seen.gradients, first.gradients)
        arm.buffers = _compared(seen.buffers, first.buffers)
    torch.manual_seed(SEED)
    arm.run()
    peak = measured_peak(arm.run, parameters)
    arm.peak_bytes, arm.whole_bytes = peak.activation_bytes, peak.whole_bytes
    return arm, seen


def _compared(
    found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]
) -> float | None:
    """The largest difference over the largest value of its tensor; 0 only where every bit is equal,
    None where one has a tensor that the other lacks."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            if a is not b:
                return None
        elif not torch.equal(a, b):
            scale = b.double().abs().max().item() or 1.0
            difference = (a.double() - b.double()).abs().max().item() / scale
            # a NaN, or equal numbers of other bits
            worst = max(worst, difference if math.isfinite(difference) else 1.0, 1e-30)
    return worst


def _versions(planner: Planner) -> dict[str, str]:
    for plan in planner.plans.values():
        return plan.report.versions
    return {"torch": torch.__version__, "actckpt": actckpt.__version__}
