"""One model and one group of peers in a process of its own: peaks, times, gradients."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import actckpt
from experiments.peers.arms import PEERS
from experiments.peers.checkpointing import NotApplicable
from experiments.peers.models import SEED, built
from experiments.peers.ours import Plan, Planner
from experiments.peers.subject import Subject
from experiments.peers.trial import Arm, Reference, tried
from experiments.timing import interleaved, ratio

Row = dict[str, Any]
UNTOUCHED, AGAIN = "untouched", "untouched again"


@dataclass(frozen=True, slots=True)
class Case:
    """What one process measures.

    Args:
        peers: names, of one group.
        rounds: timed rounds of all arms.
        peaks_only: at the peers' times no plans of their own, each of which takes several to find,
            but that of the lowest peak among those at the group's peaks that are as fast.
    """

    model: str
    peers: tuple[str, ...]
    quick: bool
    rounds: int
    peaks_only: bool = False


def rows_of(case: Case) -> tuple[dict[str, str], list[Row]]:
    """The versions, and a row for every peer of the case."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    subject = built(case.model, quick=case.quick)
    arms: dict[str, Arm] = {}
    first: Reference | None = None
    for name in (UNTOUCHED, AGAIN):
        model = copy.deepcopy(subject.model)
        arm, seen = tried(subject, model, model, first)
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
            arms[plan.name], _ = tried(subject, plan.model, plan.model, first)
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
            if not case.peaks_only:
                at_time[name] = _planned(planner.no_slower, slower)
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

    def as_fast(peer: str) -> Plan | str:
        """The plan of the lowest peak among those measured to be no slower than a peer."""
        found = [p for n, p in used.items() if n in times and over(n, peer)["median"] <= 1]
        plans = sorted(found, key=lambda p: arms[p.name].peak_bytes)
        return plans[0] if plans else "none of those at the group's peaks is as fast"

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
                "ours_at_its_time": ours(at_time.get(name) or as_fast(name), name),
            }
        rows.append(row)
    return _versions(planner), rows


def _attempt(
    arms: dict[str, Arm], name: str, subject: Subject, model: nn.Module, first: Reference
) -> str:
    """Adds the peer's arm; says what came of it."""
    try:
        runs = PEERS[name].prepare(subject, model)
        arms[name], _ = tried(subject, model, runs, first)
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


def _versions(planner: Planner) -> dict[str, str]:
    for plan in planner.plans.values():
        return plan.report.versions
    return {"torch": torch.__version__, "actckpt": actckpt.__version__}
