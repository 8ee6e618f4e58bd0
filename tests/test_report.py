"""Report and Measurement: data, text and plot."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actckpt.data.plan import Plan, Region, SavedOp
from actckpt.errors import ReportError
from actckpt.reporting.facts import Arm, Figures, OpRow, RegionRow
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.report import Report
from actckpt.reporting.timeline import Timeline
from actckpt.units import GIGABYTES, format_bytes, format_percent, format_seconds

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def ramp(length: int, top: int) -> list[int]:
    """Levels that rise to ``top`` in the middle and fall again."""
    return [top * min(i, length - 1 - i) * 2 // length for i in range(length)]


@pytest.fixture
def report() -> Report:
    blocks = tuple(Region((f"h.{i}", 0), (f"h.{i}", 0)) for i in range(12))
    span = Region(("h.0", 0), ("h.11", 0), blocks, (SavedOp("h.0", 0, "aten.mm.default", 1),))
    return Report(
        policy="auto",
        plan=Plan("auto", (span,), ("a note",)),
        budget_bytes=1_200_000_000,
        scope="step",
        baseline=Arm(Figures(2_000_000_000, 0.400, 1_500_000_000)),
        planned=Arm(Figures(1_100_000_000, 0.480, 600_000_000)),
        timeline=Timeline.downsampled(
            {"parameters": [500_000_000] * 1000, "activations": ramp(1000, 1_500_000_000)},
            {
                "parameters": [500_000_000] * 1300,
                "activations": ramp(1300, 500_000_000),
                "recomputed": ramp(1300, 100_000_000),
                "strange": [70_000_000] * 1300,
            },
            baseline_marks={"forward": 0.0, "loss": 0.49, "backward": 0.5, "optimizer": 0.95},
            planned_marks={"forward": 0.0, "loss": 0.39, "backward": 0.4, "optimizer": 0.95},
        ),
        regions=(
            RegionRow("h.0 … h.11", 12, 1_000_000, 12_000_000, 0.01, 0),
            *(RegionRow(f"h.{i}", 1, 2_000_000, 75_000_000, 0.006, 1) for i in range(12)),
        ),
        ops=tuple(
            OpRow(f"aten.op{i}.default", i + 1, "mixed", 1000 * i, 0.001 * i) for i in range(9)
        ),
        notes=("optimizer not seen", "rnn: refused, a ScriptModule"),
        versions={"torch": "2.13.0"},
        device="cpu",
    )


def with_measured(report: Report, baseline: Figures | None, planned: Figures | None) -> Report:
    return dataclasses.replace(
        report,
        baseline=dataclasses.replace(report.baseline, measured=baseline),
        planned=dataclasses.replace(report.planned, measured=planned),
    )


MEASURED = Figures(2_100_000_000, 0.5), Figures(1_150_000_000, 0.55)


@pytest.mark.parametrize("measured", [(None, None), MEASURED])
def test_report_round_trips_through_strict_json(report: Report, measured: Any) -> None:
    report = with_measured(report, *measured)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert Report.from_json(json.loads(text)) == report
    assert Report.from_json(text) == report


@pytest.mark.parametrize(
    "data",
    ["", "[]", "{}", '{"format": "actckpt.report", "format_version": 1}', '{"format": NaN}'],
)
def test_what_is_no_report_is_refused(data: str) -> None:
    with pytest.raises(ReportError, match="not a report"):
        Report.from_json(data)


def test_unknown_version_is_named(report: Report) -> None:
    with pytest.raises(ReportError, match="version 99; this actckpt reads version 1"):
        Report.from_json({**report.to_json(), "format_version": 99})


def test_overhead_is_measured_only_where_both_arms_are(report: Report) -> None:
    assert report.overhead == pytest.approx(0.2)
    half = with_measured(report, None, MEASURED[1])
    assert half.overhead == pytest.approx(0.2)
    assert half.planned.peak_bytes == 1_150_000_000
    assert with_measured(report, *MEASURED).overhead == pytest.approx(0.1)


def test_timeline_keeps_peaks_and_real_instants() -> None:
    rising = list(range(1000))
    spike = [0] * 1000
    spike[777] = 5000
    timeline = Timeline.downsampled({"a": rising, "b": spike}, {"a": [1, 2]})
    assert len(timeline.baseline["a"]) == len(timeline.baseline["b"]) == 400
    assert (777, 5000) in zip(timeline.baseline["a"], timeline.baseline["b"], strict=True)
    assert timeline.planned == {"a": (1, 2)}
    assert Timeline.downsampled({}, {}) == Timeline()


def test_text_is_compact_and_says_what_is_bounded(report: Report) -> None:
    text = str(report)
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    for part in (
        "policy auto on cpu",
        "budget 1.20 GB: 91.7 % of it used (predicted)",
        "whole step",
        "−45.0 %",
        "+20.0 %",
        "h.0, …, h.11 (12 ×)",
        "note: optimizer not seen",
        "… 3 more",
    ):
        assert part in text
    assert "measured" not in text


def test_text_without_budget_regions_or_measurements() -> None:
    arm = Arm(Figures(1_000, 1e-6))
    text = str(Report("none", Plan("none"), None, "step", arm, arm))
    assert "no budget" in text
    assert "nothing is recomputed: everything is saved" in text


def test_text_says_when_the_budget_is_exceeded(report: Report) -> None:
    over = with_measured(report, MEASURED[0], Figures(1_300_000_000, 0.5))
    assert "108.3 % of it used (measured), EXCEEDED" in str(over)


def test_scope_activations_compares_what_the_step_adds(report: Report) -> None:
    added = dataclasses.replace(report, scope="activations", budget_bytes=800_000_000)
    assert "75.0 % of it used" in str(added)


@pytest.mark.parametrize("suffix", [".json", ".txt", ".PNG", ".html"])
def test_save_chooses_by_suffix(report: Report, tmp_path: Path, suffix: str) -> None:
    path = report.save(tmp_path / f"report{suffix}")
    content = path.read_bytes()
    if suffix == ".PNG":
        assert content.startswith(PNG_MAGIC)
    elif suffix == ".html":
        assert content.startswith(b"<!doctype html>")
    elif suffix == ".json":
        assert Report.from_json(content.decode()) == report
    else:
        assert content.decode() == f"{report}\n"


@pytest.mark.parametrize("name", ["report", "report.pdf"])
def test_save_refuses_other_suffixes(report: Report, tmp_path: Path, name: str) -> None:
    with pytest.raises(ReportError, match=r"\.json .*\.txt .*\.png"):
        report.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scope", ["step", "activations"])
@pytest.mark.parametrize("measured", [(None, None), MEASURED])
def test_plot_shows_both_arms_on_one_axis(report: Report, scope: str, measured: Any) -> None:
    figure = with_measured(dataclasses.replace(report, scope=scope), *measured).plot()
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    assert "untouched" in left.get_title(loc="left")
    assert "planned" in right.get_title(loc="left")
    assert any("budget" in text.get_text() for text in right.texts)
    labels = {text.get_text() for text in figure.legends[0].texts}
    assert ("parameters" in labels) == (scope == "step")
    assert {"activations", "recomputed", "strange"} <= labels


def test_scalars_are_numbers_by_name(report: Report) -> None:
    found = with_measured(report, *MEASURED).scalars()
    assert all(name.startswith("actckpt/") for name in found)
    assert all(type(value) in (int, float) and math.isfinite(value) for value in found.values())
    solved = dataclasses.replace(report, lower_bound=np.float64(0.1))
    assert type(solved.scalars("")["lower_bound"]) is float
    assert found["actckpt/untouched_predicted_peak_bytes"] == 2_000_000_000
    assert found["actckpt/planned_measured_peak_bytes"] == 1_150_000_000
    assert found["actckpt/budget_used"] == 1_150_000_000 / 1_200_000_000
    assert found["actckpt/overhead"] == pytest.approx(0.1)
    # what is not known is left out
    assert "actckpt/planned_measured_added_bytes" not in found
    assert "actckpt/lower_bound" not in found
    assert "planned_measured_peak_bytes" not in report.scalars("")
    assert dataclasses.replace(report, lower_bound=0.1).scalars("")["gap_points"] == pytest.approx(
        10
    )


def test_plot_needs_a_timeline(report: Report) -> None:
    with pytest.raises(ReportError, match="no timeline"):
        dataclasses.replace(report, timeline=Timeline()).plot()


MEASUREMENT = Measurement(
    peak_bytes=1_234_567_890,
    added_bytes=900_000_000,
    reserved_bytes=None,
    step_s=0.123,
    step_s_spread=(0.12, 0.13),
    loss=2.5,
    steps=3,
    split={"parameters": 300_000_000, "activations": 934_567_890},
)


@pytest.mark.parametrize("loss", [None, 0.1, math.inf, -math.inf])
def test_measurement_round_trips_through_strict_json(loss: float | None) -> None:
    measurement = dataclasses.replace(MEASUREMENT, loss=loss)
    text = json.dumps(measurement.to_json(), allow_nan=False)
    assert Measurement.from_json(text) == measurement


def test_measurement_keeps_a_loss_that_is_not_a_number() -> None:
    nan = dataclasses.replace(MEASUREMENT, loss=math.nan)
    loss = Measurement.from_json(json.dumps(nan.to_json(), allow_nan=False)).loss
    assert loss is not None
    assert math.isnan(loss)


def test_measurement_as_text() -> None:
    text = str(MEASUREMENT)
    assert "3 measured steps, 120 ms to 130 ms" in text
    assert "1.23 GB" in text
    assert "reserved" not in text
    assert "reserved" in str(dataclasses.replace(MEASUREMENT, reserved_bytes=2_000_000_000))


@pytest.mark.parametrize("data", ["{}", '{"format": "actckpt.measurement", "format_version": 1}'])
def test_what_is_no_measurement_is_refused(data: str) -> None:
    with pytest.raises(ReportError, match="not a measurement"):
        Measurement.from_json(data)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_700_000, "1.00 GB"),
        (999_400_000, "999 MB"),
        (12_345_678, "12.3 MB"),
        (-5_000_000, "-5.00 MB"),
        (3_410_000_000_000, "3.41 TB"),
    ],
)
def test_bytes_as_text(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(0, "0 s"), (2.5e-6, "2.50 µs"), (0.0123, "12.3 ms"), (61.0, "61.0 s"), (1200, "20 min")],
)
def test_seconds_as_text(duration_s: float, text: str) -> None:
    assert format_seconds(duration_s) == text


@pytest.mark.parametrize(
    ("count", "text", "rounded_up"),
    [
        (0, "0.000", "0.000"),
        (999, "0.000000999", "0.000000999"),
        (412_345, "0.000412", "0.000413"),
        (99_949_999, "0.0999", "0.1000"),
        (123_456_789, "0.123", "0.124"),
        (16_000_000_000, "16.000", "16.000"),
        (3_412_000_001, "3.412", "3.413"),
    ],
)
def test_gigabytes_as_text(count: int, text: str, rounded_up: str) -> None:
    assert GIGABYTES.number(count) == text
    assert GIGABYTES.number(count, up=True) == rounded_up


def test_percent_as_text() -> None:
    assert format_percent(0.1234) == "+12.3 %"
    assert format_percent(-0.5) == "−50.0 %"


def test_the_distance_to_the_best_plan_of_its_kind_is_printed(report: Report) -> None:
    bounded = dataclasses.replace(report, lower_bound=0.1, lower_bound_of_kind=0.17)
    assert bounded.gap == pytest.approx(10)
    assert bounded.gap_of_kind == pytest.approx(3)
    text = " ".join(str(bounded).split())
    assert "no plan within the budget has less than 10.0 % overhead, and none by calls" in text
    assert "less than 17.0 %; this one is predicted 3.0 points above" in text
    alike = dataclasses.replace(report, lower_bound=0.1, lower_bound_of_kind=0.1)
    assert "10.0 % overhead; this one is predicted 10.0 points" in " ".join(str(alike).split())
    assert Report.from_json(bounded.to_json()) == bounded
