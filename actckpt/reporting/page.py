"""A report as one HTML page that fetches nothing, and as a fragment for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from actckpt.pages.chart import Chart, Layer, draw, legend
from actckpt.pages.markup import Cell, document, embedded, fragment, table
from actckpt.reporting.facts import Facts, PeakRow
from actckpt.reporting.panels import (
    Panel,
    colors_of,
    has_times,
    highest_bytes,
    panels_of,
    title_of,
    visible,
)
from actckpt.reporting.table import VERSIONS, bound_lines, figure_rows, heading, short_op
from actckpt.units import format_bytes, format_seconds

# room above the highest level, for the names of phases and what stands over a line
HEADROOM = 1.16
NO_PLAN_CHANGES = (
    "parameters", "buffers", "optimizer", "batch", "constants", "gradients", "workspace",
)  # fmt: skip


def report_page(report: Facts, data: Mapping[str, Any]) -> str:
    """A whole page: timelines that tell what lives at an instant, and tables that can be sorted.

    Args:
        data: the report as JSON data, which the page carries.
    """
    title = f"{report.model or 'training step'}, policy {report.policy}: memory of a step"
    return document(
        title,
        f"<h1>{escape(report.model or 'A training step')}</h1>",
        *_heading(report),
        _figures(report),
        *(f'<p class="muted">{escape(line)}</p>' for line in (" ".join(bound_lines(report)),)),
        *_arms(report, instants=True),
        *_next_megabyte(report),
        *_regions(report),
        *_operations(report),
        *_notes(report),
        embedded("actckpt-report", data),
    )


def report_fragment(report: Facts) -> str:
    """The figures and both timelines, for a notebook."""
    more = "report.save('report.html') writes all of it as a page, print(report) as text"
    return fragment(
        *_heading(report),
        _figures(report),
        *_arms(report, instants=False),
        f'<p class="muted">{escape(more)}</p>',
    )


def _heading(report: Facts) -> list[str]:
    over = report.planned.best.bounded_bytes(report.scope) or 0
    exceeded = report.budget_bytes is not None and over > report.budget_bytes
    first, *rest = heading(report)
    return [
        f"<p>{escape(first.removeprefix('actckpt: '))}</p>",
        *(
            f"<p{' class=over' if exceeded and 'EXCEEDED' in line else ''}>{escape(line)}</p>"
            for line in rest
        ),
    ]


def _figures(report: Facts) -> str:
    head, *rows = figure_rows(report)
    return table(head, rows)


# ---- timelines


def _arms(report: Facts, *, instants: bool) -> list[str]:
    if not report.timeline.baseline or not report.timeline.planned:
        return []
    panels = panels_of(report)
    colors = colors_of(panels)
    highest = highest_bytes(panels, report)
    shown = visible(colors, panels, highest)
    arms = [_arm(panel, panels, report, colors, instants=instants) for panel in panels]
    what = "added by the step" if report.scope == "activations" else "allocated"
    parts = [f"<h2>Memory {what}, over one step</h2>"] if instants else []
    if instants:
        parts.append(
            '<p class="muted">Point at a timeline, or move with the arrow keys, to see what lives '
            "then.</p>"
        )
    parts.append(f'<div class="arms">{"".join(arms)}</div>')
    if not instants:
        parts.append(legend([Layer(name, colors[name], ()) for name in shown]))
    return parts


def _arm(
    panel: Panel,
    panels: Sequence[Panel],
    report: Facts,
    colors: dict[str, str],
    *,
    instants: bool,
) -> str:
    width = max(p.xs[-1] for p in panels)
    layers = [
        Layer(name, color, panel.levels[name])
        for name, color in colors.items()
        if any(panel.levels.get(name, ()))
    ]
    measured = panel.arm.measured.bounded_bytes(report.scope) if panel.arm.measured else None
    source = "" if report.overhead_measured else " (predicted)"
    ends = ("0", f"{format_seconds(width)}{source}") if has_times(report) else ("first", "last")
    chart = Chart(
        name=panel.key,
        layers=layers,
        xs=panel.xs,
        width=width,
        top_bytes=HEADROOM * highest_bytes(panels, report) or 1,
        ends=ends,
        marks=panel.begins,
        budget_bytes=report.budget_bytes,
        measured=None if measured is None else (panel.xs[panel.peak_at], measured),
    )
    at = panel.peak_at
    # told apart from the timeline, which is predicted
    diamond = "" if measured is None else '<span class="measured"></span>measured'
    seconds = f' data-seconds="{width!r}"' if has_times(report) else ""
    return (
        f'<figure class="arm" data-instant="{at}"{seconds}>'
        f"<figcaption>{escape(title_of(panel, report))}{diamond}</figcaption>"
        + draw(chart)
        + (_instant(panel, layers, report, at) if instants else "")
        + "</figure>"
    )


def _instant(panel: Panel, layers: Sequence[Layer], report: Facts, at: int) -> str:
    """What lives at the peak; the page's script shows other instants in its place."""
    rows = "".join(
        f'<tr data-category="{escape(layer.name)}"><td class="word">'
        f'<i style="background:{layer.color}"></i>{escape(layer.name)}</td>'
        f'<td class="number">{format_bytes(layer.levels[at])}</td></tr>'
        for layer in reversed(layers)
    )
    living = getattr(report.timeline, f"{panel.key}_living")
    largest = [
        (_grouped(one.number, one.op, one.where), Cell(format_bytes(one.bytes), one.bytes))
        for one in (living[at] if living else ())
    ]
    return (
        '<div class="instant"><p class="at">at the predicted peak</p><div class="lists">'
        f"<div><table><tbody>{rows}<tr><th class=word>together</th>"
        f'<th class="number total">{format_bytes(panel.totals[at])}</th></tr></tbody></table></div>'
        f'<div class="living">{table(["largest activations", ""], largest)}</div></div></div>'
    )


def _grouped(count: int, op: str, where: str) -> str:
    return (f"{count} × " if count > 1 else "") + op + (f" in {where}" if where else "")


# ---- tables


def _next_megabyte(report: Facts) -> list[str]:
    if not report.at_peak:
        return []
    rows = sorted(report.at_peak, key=lambda row: (_s_per_byte(row), -row.bytes))
    cells: list[list[Cell | str]] = [
        [
            _grouped(row.count, row.op, row.where) if row.op else row.state,
            row.state if row.op else "no plan changes it",
            Cell(format_bytes(row.bytes), row.bytes),
            _time(row.recompute_s),
            Cell("", -1.0)
            if row.recompute_s is None
            else Cell(f"{_s_per_byte(row) * 1e9:.2f} ms", _s_per_byte(row)),
        ]
        for row in rows
    ]
    columns = ["alive at the planned peak", "why", "bytes", "to recompute", "for a MB"]
    return [
        "<h2>Where the next megabyte could come from</h2>",
        *(f"<p>{escape(text)}</p>" for text in _where_from(report)),
        table(columns, cells, words=2, name="at-peak"),
    ]


def _where_from(report: Facts) -> list[str]:
    def size(*rows: PeakRow) -> str:
        return format_bytes(sum(row.bytes for row in rows))

    rows = report.at_peak
    possible = sorted((r for r in rows if r.recompute_s is not None), key=_s_per_byte)
    fixed = [r for r in rows if r.state in NO_PLAN_CHANGES]
    rest = [r for r in rows if r.recompute_s is None and r not in fixed]
    texts = [f"The predicted peak is {size(*rows)}."]
    if fixed:
        texts[0] += f" No plan changes {size(*fixed)} of it."
    if possible:
        first = possible[0]
        texts.append(
            f"{size(*possible)} is saved for backward and could be recomputed, the cheapest first: "
            f"{_grouped(first.count, first.op, first.where)}, {size(first)} for "
            f"{_s_per_byte(first) * 1e9:.2f} ms a MB. This is the least in time and the most in "
            "memory: what these operations read must be there, or be recomputed too. A lower "
            "budget finds the true price."
        )
    else:
        texts.append("Nothing that is saved then could be recomputed.")
    if rest:
        texts.append(
            f"{size(*rest)} is in use, was just recomputed, or recomputations begin from it: a "
            "smaller batch makes it smaller."
        )
    return texts


def _s_per_byte(row: PeakRow) -> float:
    return float("inf") if row.recompute_s is None else row.recompute_s / max(row.bytes, 1)


def _time(duration_s: float | None) -> Cell:
    return Cell("", -1.0) if duration_s is None else Cell(format_seconds(duration_s), duration_s)


def _regions(report: Facts) -> list[str]:
    if not report.regions:
        return ["<h2>Recomputed</h2>", "<p>Nothing is recomputed: everything is saved.</p>"]
    total = sum(region.recompute_s for region in report.regions)
    rows = [
        [
            Cell("\N{EM SPACE}" * region.depth + region.label, number),
            Cell(str(region.ops), region.ops),
            Cell(format_bytes(region.saved_bytes), region.saved_bytes),
            Cell(format_bytes(region.dropped_bytes), region.dropped_bytes),
            Cell(format_seconds(region.recompute_s), region.recompute_s),
        ]
        for number, region in enumerate(report.regions)
    ]
    columns = ["in the order of the forward", "operations", "kept for it", "dropped", "recompute"]
    return [
        "<h2>Recomputed</h2>",
        f"<p>{len(rows)} in all, {format_seconds(total)} of a step.</p>",
        table(columns, rows, name="regions"),
    ]


def _operations(report: Facts) -> list[str]:
    if not report.ops:
        return []
    rows: list[list[Cell | str]] = [
        [
            short_op(row.name),
            row.state,
            Cell(str(row.count), row.count),
            Cell(format_bytes(row.bytes), row.bytes),
            Cell(format_seconds(row.seconds), row.seconds),
        ]
        for row in report.ops
    ]
    columns = ["what backward needs", "state", "calls", "bytes", "time"]
    return ["<h2>Operations</h2>", table(columns, rows, words=2, name="operations")]


def _notes(report: Facts) -> list[str]:
    versions = ", ".join(f"{k} {report.versions[k]}" for k in VERSIONS if k in report.versions)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return [
        *(["<h2>What the budget does not cover, and other notes</h2>"] if notes else []),
        f"<ul>{notes}</ul>" if notes else "",
        f'<p class="muted">{escape(versions)}</p>' if versions else "",
    ]
