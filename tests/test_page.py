"""A report as a page: what stands on it is what the JSON says, and nothing is fetched."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import actckpt
from actckpt.reporting.panels import panels_of
from actckpt.reporting.report import Report
from actckpt.reporting.timeline import Timeline
from actckpt.units import format_bytes, format_seconds
from tests.browser import NAMES, Browser, browser, executable
from tests.test_living import Blocks, by_operations

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'so'"


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    model, batch = Blocks(), torch.randn(256, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    untouched = actckpt.measure(model, batch, optimizer=optimizer)
    budget_gb = 0.95 * untouched.peak_bytes / 1e9
    actckpt.optimize(model, budget_gb, batch=batch, optimizer=optimizer, policy=by_operations)
    actckpt.measure(model, batch, optimizer=optimizer)
    found = actckpt.report(model)
    return dataclasses.replace(found, notes=(*found.notes, HOSTILE))


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.save(tmp_path_factory.mktemp("page") / "report.html")


def test_the_page_holds_the_report(report: Report, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="actckpt-report">(.*?)</script>', text)
    assert found is not None
    assert Report.from_json(found[1]) == report
    # no address is loaded: neither by a tag nor by a style
    rest = text.replace(found[0], "")
    assert rest.count("src=x") == 1  # escaped, in a note
    loading = r"\b(src|href|action)=|url\(|import\b"
    assert not re.search(loading, rest.replace("src=x", ""))
    assert "onerror=alert(2)>" not in rest
    assert HOSTILE not in rest


def test_a_fragment_runs_no_script(report: Report) -> None:
    text = report._repr_html_()
    assert "<script" not in text
    assert text.count("<svg") == 2
    assert format_bytes(report.planned.peak_bytes) in text
    assert len(text) < 250_000


def test_a_report_without_a_timeline_is_a_page(report: Report) -> None:
    bare = dataclasses.replace(report, timeline=Timeline(), at_peak=(), regions=(), ops=())
    assert "<svg" not in bare._repr_html_()


def test_a_graph_in_a_notebook() -> None:
    graph = actckpt.trace(Blocks(), torch.randn(8, 32))
    text = graph._repr_html_()
    assert f"{len(graph.ops)} operations" in text
    assert "<svg" in text
    assert "<script" not in text
    assert len(text) < 100_000


def test_the_time_axis_ends_with_the_step_that_is_stated(report: Report) -> None:
    assert report.overhead_measured
    untouched, planned = panels_of(report)
    assert untouched.xs[-1] == pytest.approx(report.baseline.step_s, rel=1e-12)
    assert planned.xs[-1] == pytest.approx(report.planned.step_s, rel=1e-12)
    axes = report.plot().axes[0]
    assert axes.get_xlim()[1] == max(untouched.xs[-1], planned.xs[-1])
    assert "measured" in axes.get_xlabel()
    title = report.plot()._suptitle  # type: ignore[attr-defined]
    assert "Blocks" in title.get_text()


# ---- in a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if executable() is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on the path")
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def shown(tab: Browser, arm: int) -> dict[str, Any]:
    """What the page says to live at an arm's instant."""
    found: dict[str, Any] = json.loads(
        tab.run(
            f"""(() => {{
              const arm = document.querySelectorAll(".arm")[{arm}];
              const rows = [...arm.querySelectorAll("tr[data-category]")];
              return JSON.stringify({{
                instant: Number(arm.dataset.instant),
                at: arm.querySelector(".at").textContent,
                total: arm.querySelector(".total").textContent,
                levels: Object.fromEntries(rows.map(
                  (row) => [row.dataset.category, row.lastElementChild.textContent])),
                living: [...arm.querySelectorAll(".living tbody tr")].map(
                  (row) => [...row.cells].map((cell) => cell.textContent)),
              }});
            }})()"""
        )
    )
    return found


def expected(report: Report, key: str, instant: int) -> dict[str, Any]:
    """The same from the report."""
    levels = {
        name: level[instant] for name, level in getattr(report.timeline, key).items() if any(level)
    }
    living = getattr(report.timeline, f"{key}_living")[instant]
    return {
        "total": format_bytes(sum(levels.values())),
        "levels": {name: format_bytes(size) for name, size in levels.items()},
        "living": [
            [
                (f"{one.number} × " if one.number > 1 else "")
                + one.op
                + (f" in {one.where}" if one.where else ""),
                format_bytes(one.bytes),
            ]
            for one in living
        ],
    }


def test_the_page_fetches_nothing_and_says_what_the_json_says(
    report: Report, page: Path, tab: Browser
) -> None:
    tab.open(page)
    for arm, panel in enumerate(panels_of(report)):
        name = panel.key
        found = shown(tab, arm)
        assert found["instant"] == panel.peak_at
        where = tab.run(
            f"(({'{'}x, y, width, height{'}'}) => [x, y, width, height])"
            f"(document.querySelectorAll('.plot')[{arm}].getBoundingClientRect())"
        )
        x, y, width, height = where
        for sample in (0, len(panel.xs) // 3, len(panel.xs) - 1):
            share = panel.xs[sample] / max(p.xs[-1] for p in panels_of(report))
            # inside of the last pixel
            tab.point_at(x + min(share * width, width - 0.5), y + height / 2)
            found = shown(tab, arm)
            near = [abs(t - panel.xs[sample]) for t in panel.xs]
            assert near[found["instant"]] <= 0.002 * panel.xs[-1]
            wanted = expected(report, name, found["instant"])
            assert {k: found[k] for k in wanted} == wanted
            assert getattr(report.timeline, f"{name}_running")[found["instant"]] in found["at"]
        # and by the keyboard
        before = found["instant"]
        tab.run(f"document.querySelectorAll('.plot')[{arm}].focus()")
        tab.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", code="ArrowLeft")
        assert shown(tab, arm)["instant"] == before - 1
    assert tab.requested() == [page.resolve().as_uri()]
    assert tab.complaints() == []


def test_the_figures_and_tables_are_those_of_the_json(
    report: Report, page: Path, tab: Browser
) -> None:
    tab.open(page)
    text = tab.run("document.querySelector('main').innerText")
    measured = report.planned.measured
    assert measured is not None
    assert report.budget_bytes is not None
    for number in (
        format_bytes(report.budget_bytes),
        format_bytes(measured.peak_bytes),
        format_bytes(report.baseline.predicted.peak_bytes),
        format_seconds(measured.step_s),
        HOSTILE,  # as text
    ):
        assert number in text

    def column(table: str, number: int) -> list[str]:
        rows = f"document.getElementById('{table}').tBodies[0].rows"
        found: list[str] = tab.run(f"[...{rows}].map((row) => row.cells[{number}].textContent)")
        return found

    def click(table: str, number: int) -> None:
        tab.run(f"document.getElementById('{table}').tHead.rows[0].cells[{number}]"
                ".firstElementChild.click()")  # fmt: skip

    assert column("regions", 3) == [format_bytes(r.dropped_bytes) for r in report.regions]
    click("operations", 3)
    by_bytes = sorted(report.ops, key=lambda row: -row.bytes)
    assert column("operations", 3) == [format_bytes(row.bytes) for row in by_bytes]
    click("operations", 3)
    assert column("operations", 3) == [format_bytes(row.bytes) for row in reversed(by_bytes)]
    click("operations", 0)
    names = column("operations", 0)
    assert names == sorted(names, reverse=True)
    sizes = sorted((row.bytes for row in report.at_peak), reverse=True)
    click("at-peak", 2)
    assert column("at-peak", 2) == [format_bytes(size) for size in sizes]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_and_the_dark(
    page: Path, tab: Browser, width: int, dark: bool
) -> None:
    tab.open(page, width=width, dark=dark)
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    color, paper = tab.run(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )

    def brightness(text: str) -> float:
        red, green, blue = map(int, re.findall(r"\d+", text)[:3])
        return (red + green + blue) / 765

    assert (brightness(paper) < 0.2) == dark
    assert abs(brightness(color) - brightness(paper)) > 0.6


@pytest.mark.parametrize("value", [0, 999, 1000, 999_400_000, 999_700_000, 12_345_678, 3.41e12])
def test_bytes_are_written_alike(page: Path, tab: Browser, value: float) -> None:
    tab.open(page)
    assert tab.run(f"bytes({value})") == format_bytes(value)


@pytest.mark.parametrize("value", [0, 2.5e-6, 0.0123, 61.0, 1200])
def test_seconds_are_written_alike(page: Path, tab: Browser, value: float) -> None:
    tab.open(page)
    assert tab.run(f"seconds({value})") == format_seconds(value)
