"""Puts a report together from what planning found."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from actckpt.data.graph import Graph
from actckpt.data.plan import Burst, Plan
from actckpt.data.profile import Profile
from actckpt.interpreting.bursts import place_bursts
from actckpt.interpreting.recomputation import Recomputation
from actckpt.interpreting.regions import place
from actckpt.planning.choosing import bound_of
from actckpt.planning.request import Planned, Request
from actckpt.reporting.facts import Arm, Figures, OpRow, RegionRow
from actckpt.reporting.living import at_peak
from actckpt.reporting.report import Report
from actckpt.reporting.sampled import timeline_of
from actckpt.versions import versions


def assemble_report(
    planned: Planned, request: Request, notes: tuple[str, ...] = (), *, model: str = ""
) -> Report:
    """The report of a plan before anything was measured.

    Args:
        model: name of the model's class.
    """
    graph, untouched = planned.graph, planned.untouched
    dry = planned.dry
    return Report(
        policy=request.policy_name,
        plan=planned.plan,
        budget_bytes=request.budget_bytes,
        scope=request.scope,
        baseline=Arm(Figures(untouched.peak_bytes, untouched.time_s, untouched.added_bytes)),
        planned=Arm(Figures(dry.peak_bytes, planned.price.time_s, dry.added_bytes)),
        timeline=timeline_of(graph, dry, planned.profile),
        regions=_regions(graph, planned),
        ops=_ops(graph, planned.plan, planned.profile),
        notes=(
            *_estimated(graph),
            *_unbounded(graph),
            *planned.plan.notes,
            *_refusals(graph),
            *notes,
        ),
        versions=versions(),
        device=planned.profile.device + (", estimated (roofline)" if graph.stands_for else ""),
        model=model,
        at_peak=at_peak(graph, planned.profile, dry, request.scope),
    )


def with_bound(report: Report, planned: Planned, request: Request) -> Report:
    """The report with what no plan can beat, which takes the solver a moment."""
    bound = bound_of(planned, request)
    if bound is None or not bound.possible:
        return report
    of_kind = bound.by_operations if report.plan.bursts else bound.by_calls
    return dataclasses.replace(
        report,
        lower_bound=bound.overhead,
        lower_bound_of_kind=of_kind,
        certificate=bound.certificate,
    )


def _estimated(graph: Graph) -> list[str]:
    if not graph.stands_for:
        return []
    return [
        "nothing was measured: the operations are those that PyTorch would choose on this device, "
        "their times come from its data sheet, and of the scratch inside kernels only fused "
        "attention's is counted (cuBLAS and cuDNN take up to tens of MB more)"
    ]


def _unbounded(graph: Graph) -> list[str]:
    notes = []
    if not graph.loss_seen:
        notes.append(
            "the loss was not seen: backward was taken to start from the outputs, and memory of a "
            "loss computed outside the model is not bounded (pass loss_fn, or labels)"
        )
    if not graph.optimizer_seen:
        notes.append(
            "no optimizer was seen: its state and its step are not bounded until its first step "
            "(pass optimizer)"
        )
    notes += [
        f"{why}: this optimizer's step is not traced; what it holds counts, and what it takes for "
        "a while as measured in a real step, once one was made"
        for _, why in graph.untraced_optimizers
    ]
    if graph.supposed:
        more = f" and {len(graph.supposed) - 1} more lines" if len(graph.supposed) > 1 else ""
        notes.append(
            f"{graph.supposed[0]}{more} asks whether something holds of activations: planned as if "
            "no guard fires; a step in which one does is another one, and may take more"
        )
    if graph.shaped_by_values:
        notes.append(
            "a shape depends on values (rows that a mask picks, lengths of labels): the memory is "
            "that of this batch's, and what another takes beyond it is not bounded"
        )
    return notes


def _refusals(graph: Graph) -> list[str]:
    """Why stages that save something may not be recomputed, once per reason."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for stage in graph.stages:
        reason = stage.refusal or ("changes an argument in place" if stage.mutates else "")
        if reason and stage.last_save > stage.first_save:
            reasons[reason].append(stage.path or stage.kind)
    return [
        f"not recomputed: {paths[0]}"
        + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        + f": {reason}"
        for reason, paths in reasons.items()
    ]


def _regions(graph: Graph, planned: Planned) -> tuple[RegionRow, ...]:
    plan, price = planned.plan, planned.price
    placed = place(graph, plan)
    kept: list[set[int]] = []
    for p in placed:
        saved = {graph.values[graph.saves[k].value].storage for k in p.kept}
        saved.update(graph.values[v].storage for op in p.captured for v in graph.ops[op].outputs)
        kept.append(saved)
    calls = [graph.stages[p.stages[0]].first for p in placed]
    ends = [graph.stages[p.stages[-1]].last for p in placed]
    shown = [
        (p.region.label, last - first, p.depth)
        for p, first, last in zip(placed, calls, ends, strict=True)
    ]
    for burst in place_bursts(Recomputation(graph), plan):
        kept.append(set(burst.pins))
        depth = 0 if burst.parent < 0 else shown[burst.parent][2] + 1
        shown.append((_span(graph, burst.burst), len(burst.burst.ops), depth))
    return tuple(
        RegionRow(
            label=label,
            ops=ops,
            saved_bytes=sum(graph.storages[s].bytes for s in saved),
            dropped_bytes=dropped,
            recompute_s=seconds,
            depth=depth,
        )
        for (label, ops, depth), saved, dropped, seconds in zip(
            shown, kept, price.region_bytes, price.region_s, strict=True
        )
    )


def _span(graph: Graph, burst: Burst) -> str:
    """The modules whose operations a burst runs first and last."""
    stages = (graph.ops[burst.ops[n]].stage for n in (0, -1))
    return " … ".join(dict.fromkeys(graph.stages[s].path or "the model" for s in stages))


def _ops(graph: Graph, plan: Plan, profile: Profile) -> tuple[OpRow, ...]:
    dropped = {k for p in place(graph, plan) for k in p.dropped}
    dropped.update(k for burst in plan.walk_bursts() for k in burst.drops)
    states: dict[int, bool] = {}
    for k, save in enumerate(graph.saves):
        sid = graph.values[save.value].storage
        if not save.held and sid >= 0 and graph.storages[sid].born >= 0:
            states[sid] = states.get(sid, True) and k in dropped
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
    for sid, recomputed in states.items():
        op = graph.ops[graph.storages[sid].born]
        row = totals[op.name]
        row[0] += 1
        row[1] += recomputed
        row[2] += graph.storages[sid].bytes
        row[3] += profile.costs[op.signature].time_s
    rows = [
        OpRow(
            name=name,
            count=int(count),
            state="recomputed" if again == count else "mixed" if again else "saved",
            bytes=int(size),
            seconds=seconds,
        )
        for name, (count, again, size, seconds) in totals.items()
    ]
    return tuple(sorted(rows, key=lambda r: -r.bytes))
