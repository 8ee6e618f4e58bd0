"""The command line, run in this process on a model of a few kilobytes."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.cli import main, make_parser
from actckpt.commands.compare_shown import LOOKS, draw, make_table, why_little_fits
from actckpt.commands.sweep import Pair, Row, pair, percents_between, sweep
from actckpt.data.budget_error import BudgetError
from actckpt.data.plan import Plan, Region
from actckpt.policies import POLICIES
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.report import Report

TARGET = f"{__name__}:make_target"
SMALL = f"{__name__}:make_small"


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


def make_small() -> tuple[nn.Module, torch.Tensor]:
    """The same with fewer layers."""
    return Blocks(2), torch.randn(512, 16)


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
        (["plan", TARGET, "--budget-gb", "1", "--save", "plan.pdf"], ".html, .json, .txt, .png"),
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


def test_python_m_does_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "actckpt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"actckpt {actckpt.__version__}\n"


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


# help


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of the commands inside it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from commands(inner)


@pytest.mark.parametrize("parser", list(commands(make_parser())), ids=lambda parser: parser.prog)
def test_every_help_has_defaults_and_an_example(parser: argparse.ArgumentParser) -> None:
    text = parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        assert action.help, f"{parser.prog} {action.dest} has no help"
        default = action.default
        if default not in (None, [], argparse.SUPPRESS) and default is not False:
            words = " ".join(text.split())
            assert f"(default: {default})" in words, f"{parser.prog} {action.dest}"
    examples = re.findall(r"^(?:example: |  )(actckpt .+)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        assert example.startswith(parser.prog) or parser.prog == "actckpt"
        assert callable(make_parser().parse_args(shlex.split(example)[1:]).run)


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


def test_compare_bounds_activations_where_plans_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compare", SMALL, "--policies", "calls,full", "--steps", "1", "--out", str(tmp_path)]
    assert main(argv) == 0
    data = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert data["scope"] == "activations"
    percents = [row["percent"] for row in data["rows"] if row["policy"] == "calls"]
    assert len(percents) == 6
    assert percents == sorted(percents, reverse=True)
    assert percents[0] < 100
    fits = [row["fits"] for row in data["rows"]]
    assert sum(fits) >= len(fits) / 2
    assert "smallest plan of all" not in capsys.readouterr().out


def test_budgets_lie_between_the_smallest_and_the_untouched() -> None:
    percents = percents_between(250, 1000)
    assert percents == [87.5, 75.0, 62.5, 50.0, 37.5, 25.0]
    # rounded up: the smallest plan fits the last
    assert percents_between(333_333, 1_000_000)[-1] == 33.4
    assert percents_between(1000, 1000) == [100.0]


def test_where_little_fits_it_says_why() -> None:
    rows = [Row("auto", p, 10 * p, fits=False, smallest_bytes=900) for p in (30, 20, 10)]
    text = " ".join(why_little_fits(rows, 1000, 150, "step"))
    assert "0 of 3 fit" in text
    assert "900 B (90 % of the untouched model): auto" in text
    assert "850 B (85 %) are parameters" in text
    assert "--scope activations" in text
    assert "--scope activations" not in " ".join(why_little_fits(rows, 1000, 150, "activations"))
    assert why_little_fits([Row("auto", 90, 900, fits=True)], 1000, 150, "step") == []


def test_no_two_policies_look_alike() -> None:
    assert set(LOOKS) == set(POLICIES)
    assert len({color for color, _ in LOOKS.values()}) == len(LOOKS)


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
