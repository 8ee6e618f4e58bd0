"""The command line, run in this process on a model of a few kilobytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.cli import main
from actckpt.commands.compare import Pair, Row, draw, make_table, pair, sweep
from actckpt.errors import BudgetError
from actckpt.plan import Plan, Region
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.report import Report

TARGET = f"{__name__}:make_target"


class Blocks(nn.Module):
    """A few equal layers called from a loop."""

    def __init__(self, layers: int = 6, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def make_target() -> tuple[nn.Module, torch.Tensor]:
    """What the command line loads."""
    return Blocks(), torch.randn(512, 16)


def exit_status(*argv: str) -> int:
    """The status with which the process would end."""
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else -1


# arguments


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice"),
        (["plan"], "TARGET"),
        (["plan", TARGET, "--budget-gb", "-1"], "not a size"),
        (["plan", TARGET, "--budget-gb", "8 parsec"], "not a size"),
        (["plan", TARGET, "--budget-gb", "1", "--policy", "magic"], "invalid choice: 'magic'"),
        (["plan", TARGET, "--budget-gb", "1", "--set", "n_layer"], "KEY=VALUE"),
        (["plan", TARGET, "--budget-gb", "1", "--batch-size", "0"], "positive whole number"),
        (["plan", TARGET, "--budget-gb", "1", "--save", "plan.pdf"], ".json, .txt, .png"),
        (["plan", TARGET, "--budget-gb", "1", "--scope", "all"], "invalid choice: 'all'"),
        (["compare", TARGET, "--policies", "auto,magic"], "no policy 'magic'; there are none"),
        (["compare", TARGET, "--budgets", "90,much"], "percentages above 0"),
        (["compare", TARGET, "--budgets", "0"], "percentages above 0"),
        (["demo", "--steps", "none"], "positive whole number"),
    ],
)
def test_bad_arguments_end_with_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(*argv) == 2
    assert message in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("--version") == 0
    assert re.fullmatch(r"actckpt \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "no_such_module:f", "--budget-gb", "1"], "no_such_module"),
        (["plan", TARGET, "--budget-gb", "1B"], "budget"),
        (["compare", f"{__name__}:missing"], "missing"),
    ],
)
def test_errors_of_the_user_are_one_message(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("actckpt: ")
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 10


# plan


def test_plan_prints_and_saves_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "new" / "plan.json"
    status = main(["plan", TARGET, "--budget-gb", "4 MB", "--policy", "full", "--save", str(saved)])
    assert status == 0
    out = capsys.readouterr().out
    assert TARGET in out
    assert "policy full" in out
    assert "budget 4.00 MB" in out
    report = Report.from_json(saved.read_text(encoding="utf-8"))
    assert report.policy == "full"
    assert report.planned.measured is None


def test_plan_without_budget_applies_the_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", TARGET, "--policy", "full", "--optimizer", "sgd"]) == 0
    assert "no budget" in capsys.readouterr().out


# compare


def test_compare_measures_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compare", TARGET, "--policies", "auto,full", "--budgets", "90,5", "--steps", "1"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "does not fit (smallest" in out
    data = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert data["target"] == TARGET
    rows = data["rows"]
    assert [(r["policy"], r["percent"], r["fits"]) for r in rows] == [
        ("auto", 90, True),
        ("auto", 5, False),
        ("full", 90, True),
        ("full", 5, False),
    ]
    for row in rows:
        if row["fits"]:
            assert row["measured_bytes"] <= row["budget_bytes"]
        else:
            assert row["smallest_bytes"] > row["budget_bytes"]
    assert (tmp_path / "compare.png").stat().st_size > 1000


def measurement(step_s: float, peak_bytes: int) -> Measurement:
    return Measurement(peak_bytes, peak_bytes // 2, None, step_s, (step_s, step_s), 1.0, 1)


def test_sweep_measures_each_plan_once_beside_the_untouched_model() -> None:
    state: dict[str, Any] = {"plan": None, "measured": 0}

    def planned(policy: str, budget_bytes: int) -> tuple[Plan, int]:
        if budget_bytes < 500:
            raise BudgetError("too small", budget_bytes=budget_bytes, smallest_bytes=500)
        plan = state["plan"] = Plan("full", (Region(("a", 0), ("a", 0)),))
        return plan, 490

    def measured() -> Pair:
        state["measured"] += 1
        assert state["plan"] is not None
        return pair([(measurement(2.0, 480), measurement(1.0, 1000))], "step")

    def reverted() -> None:
        state["plan"] = None

    rows = list(
        sweep(
            ["full"],
            [90, 60, 40],
            1000,
            planned=planned,
            measured=measured,
            reverted=reverted,
            progress=lambda text: None,
        )
    )
    assert state["measured"] == 1
    assert state["plan"] is None
    assert [row.fits for row in rows] == [True, True, False]
    assert [row.ratio for row in rows] == [2.0, 2.0, None]
    assert [row.measured_bytes for row in rows] == [480, 480, None]
    assert rows[2].smallest_bytes == 500
    assert make_table(rows).row_count == 3
    assert len(draw(rows, 1000, "title").axes[0].lines) >= 2


def test_a_pair_takes_the_highest_peak_and_the_median_of_ratios() -> None:
    rounds = [
        (measurement(2.0, 480), measurement(1.0, 1000)),
        (measurement(9.0, 490), measurement(9.0, 1000)),
        (measurement(3.0, 470), measurement(1.0, 1000)),
    ]
    assert pair(rounds, "step") == Pair(490, 3.0, 1.0, 2.0)
    assert pair(rounds, "activations").planned_bytes == 245


def test_rows_without_any_fit_can_be_drawn() -> None:
    rows = [Row("auto", 10.0, 100, fits=False)]
    assert make_table(rows).row_count == 1
    draw(rows, 1000, "title")


def test_checkpoints_are_listed_shown_and_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("checkpoint", "ls", str(tmp_path)) == 2
    assert "holds no checkpoints" in capsys.readouterr().err
    with actckpt.Checkpointer(tmp_path, model=Blocks(1), every=1) as run:
        run.step(metrics={"loss": 0.5})
        run.step(metrics={"loss": 0.25})
        run.pin(1)
    assert exit_status("checkpoint", "ls", str(tmp_path)) == 0
    newest, oldest = capsys.readouterr().out.splitlines()
    assert newest.startswith("step-00000002")
    assert "loss=0.25" in newest
    assert "pinned" in oldest
    assert exit_status("checkpoint", "show", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "step 2" in out
    assert "model/layers.0.0.weight  float32 [64, 16]" in out
    assert exit_status("checkpoint", "verify", str(tmp_path)) == 0
    assert capsys.readouterr().out.count("sound") == 2
    weights = tmp_path / "step-00000001" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    assert exit_status("checkpoint", "verify", str(tmp_path)) == 1
    assert "step-00000001/model.safetensors is damaged" in capsys.readouterr().out
    assert exit_status("checkpoint", "verify", str(tmp_path / "step-00000002")) == 0
