"""A report as plain text, thirty lines or so."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from textwrap import wrap

from actckpt.reporting.facts import Facts, RegionRow
from actckpt.reporting.timeline import Timeline
from actckpt.units import format_bytes, format_percent, format_seconds

MAX_REGION_ROWS = 6
MAX_OP_ROWS = 6
MAX_LABEL = 44
WIDTH = 100
VERSIONS = ("actckpt", "torch", "transformers", "cuda", "python")

SCOPES = {
    "step": "allocated memory over the whole step",
    "activations": "what the step adds to parameters, gradients, optimizer state and batch",
}


def align(rows: Sequence[Sequence[str]], *, left: int = 1, gap: str = "   ") -> list[str]:
    """Lines with the first ``left`` columns flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def render_report(report: Facts) -> str:
    """The report as a compact table."""
    blocks = [
        heading(report),
        align(figure_rows(report)),
        bound_lines(report),
        _category_lines(report.timeline),
        _region_lines(report.regions),
        _op_lines(report),
        [
            line
            for note in report.notes
            for line in wrap(f"note: {note}", WIDTH, subsequent_indent="  ")
        ],
        [", ".join(f"{k} {report.versions[k]}" for k in VERSIONS if k in report.versions)],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if any(block))


def heading(report: Facts) -> list[str]:
    """Policy, model and device; the budget and how much of it is used; what it bounds."""
    of_model = f" of {report.model}" if report.model else ""
    lines = [f"actckpt: policy {report.policy}{of_model} on {report.device}"]
    if report.budget_bytes is None:
        lines.append("no budget")
        return lines
    lines.append(f"budget {format_bytes(report.budget_bytes)}")
    bounded = report.planned.best.bounded_bytes(report.scope)
    if bounded is not None:
        used = bounded / report.budget_bytes
        source = "measured" if report.planned.measured else "predicted"
        lines[-1] += f": {100 * used:.1f} % of it used ({source})"
        lines[-1] += ", EXCEEDED" if used > 1 else ""
    lines.append(f"bounds {SCOPES.get(report.scope, report.scope)}")
    return lines


def figure_rows(report: Facts) -> list[list[str]]:
    """Peak, bytes added and step time of both arms, predicted and measured, under column heads."""
    rows = [["", "untouched", "planned", "change"]]
    measured = (report.baseline.measured, report.planned.measured)
    predicted = (report.baseline.predicted, report.planned.predicted)
    for source, (baseline, planned) in (("predicted", predicted), ("measured", measured)):
        if baseline is None and planned is None:
            continue
        for what, attribute, form in (
            ("peak", "peak_bytes", format_bytes),
            ("added by the step", "added_bytes", format_bytes),
            ("step time", "step_s", format_seconds),
        ):
            pair = [getattr(arm, attribute) if arm else None for arm in (baseline, planned)]
            if pair == [None, None]:
                continue
            change = ""
            if pair[0] and pair[1] is not None:
                change = format_percent(pair[1] / pair[0] - 1)
            rows.append(
                [f"{what}, {source}", *("" if v is None else form(v) for v in pair), change]
            )
    return rows


def bound_lines(report: Facts) -> list[str]:
    """How far the plan is from what no plan can beat; empty where that is not known."""
    if report.lower_bound is None or report.gap is None:
        return []
    least, above = f"{100 * report.lower_bound:.1f} % overhead", report.gap
    of_kind = report.lower_bound_of_kind
    if of_kind is not None and of_kind > report.lower_bound:
        kind = "operations" if report.plan.bursts else "calls"
        least += f", and none by {kind} less than {100 * of_kind:.1f} %"
        above -= 100 * (of_kind - report.lower_bound)
    where = "the least" if round(above, 1) <= 0 else f"{above:.1f} points above"
    return wrap(
        f"no plan within the budget has less than {least}; this one is predicted {where} "
        f"({report.certificate})",
        WIDTH,
    )


def _category_lines(timeline: Timeline) -> list[str]:
    at_peak = [_at_peak(levels) for levels in (timeline.baseline, timeline.planned)]
    names = list(dict.fromkeys(name for split in at_peak for name in split))
    rows = [
        [name, *(format_bytes(split[name]) if name in split else "" for split in at_peak)]
        for name in names
        if any(split.get(name) for split in at_peak)
    ]
    return align([["at the predicted peak", "untouched", "planned"], *rows]) if rows else []


def _at_peak(levels: dict[str, tuple[int, ...]]) -> dict[str, int]:
    totals = [sum(at) for at in zip(*levels.values(), strict=True)]
    if not totals:
        return {}
    peak = totals.index(max(totals))
    return {name: level[peak] for name, level in levels.items()}


def _region_lines(regions: Sequence[RegionRow]) -> list[str]:
    if not regions:
        return ["nothing is recomputed: everything is saved"]
    rows = [["recomputed", "ops", "kept for it", "dropped", "recompute"]]
    # equal neighbours (the blocks of a transformer) share a row
    runs = [
        list(run)
        for _, run in groupby(
            regions,
            key=lambda r: (r.depth, r.ops, r.saved_bytes, r.dropped_bytes),
        )
    ]
    for run in runs[:MAX_REGION_ROWS]:
        rows.append(_region_row(_run_label(run), run))
    rest = [r for run in runs[MAX_REGION_ROWS:] for r in run]
    if rest:
        rows.append(_region_row(f"… {len(rest)} more", rest))
    if len(runs) > 1:
        # what a nested region runs is counted in the outer one too
        total = _region_row(f"all {len(regions)}", regions)
        rows.append([total[0], "", *total[2:]])
    return align(rows)


def _run_label(run: Sequence[RegionRow]) -> str:
    indent = "  " * run[0].depth
    if len(run) == 1:
        return indent + shortened(run[0].label)
    return f"{indent}{shortened(run[0].label)}, …, {shortened(run[-1].label)} ({len(run)} ×)"


def _region_row(label: str, regions: Sequence[RegionRow]) -> list[str]:
    return [
        label,
        str(sum(r.ops for r in regions)),
        format_bytes(sum(r.saved_bytes for r in regions)),
        format_bytes(sum(r.dropped_bytes for r in regions)),
        format_seconds(sum(r.recompute_s for r in regions)),
    ]


def _op_lines(report: Facts) -> list[str]:
    if not report.ops:
        return []
    ordered = sorted(report.ops, key=lambda o: (-o.bytes, -o.seconds, o.name))
    rows = [["op", "state", "calls", "bytes", "time"]]
    rows += [
        [short_op(o.name), o.state, str(o.count), format_bytes(o.bytes), format_seconds(o.seconds)]
        for o in ordered[:MAX_OP_ROWS]
    ]
    if rest := ordered[MAX_OP_ROWS:]:
        rows.append(
            [
                f"… {len(rest)} more",
                "",
                str(sum(o.count for o in rest)),
                format_bytes(sum(o.bytes for o in rest)),
                format_seconds(sum(o.seconds for o in rest)),
            ]
        )
    return align(rows, left=2)


def shortened(label: str) -> str:
    """A label that is too long without its middle."""
    if len(label) <= MAX_LABEL:
        return label
    half = (MAX_LABEL - 1) // 2
    return f"{label[:half]}…{label[-half:]}"


def short_op(name: str) -> str:
    """An operation's name without namespace and overload, such as ``mm``."""
    return shortened(name.removeprefix("aten.").removesuffix(".default"))
