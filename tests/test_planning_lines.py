"""What planning says, where, and that nothing else reaches standard output."""

from __future__ import annotations

import ctypes
import logging
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from scipy import optimize

import actckpt
from actckpt.policies.solver.solver_output import milp, without_solver_output
from actckpt.progress import progress_shown, stage
from actckpt.units import format_change
from tests.exact import scalar_loss
from tests.models.blocks import chain, rows
from tests.suite import seeded

pytestmark = pytest.mark.usefixtures("flat_profile")

LINE = re.compile(r"actckpt: planned in [\d.]+ (s|ms|min): [\d.]+ → [\d.]+ \w?B, [+−]\d+ %")


def half_gb() -> float:
    untouched = actckpt.measure(seeded(chain(6))(), rows(48), loss_fn=scalar_loss, steps=1)
    return 0.7 * untouched.peak_bytes / 1e9


def test_one_line_says_what_was_planned_and_why_again(caplog: pytest.LogCaptureFixture) -> None:
    model, budget = seeded(chain(6))(), half_gb()
    with caplog.at_level(logging.INFO, logger="actckpt"):
        actckpt.optimize(model, budget, loss_fn=scalar_loss)
        model(rows(48))
        assert [bool(LINE.fullmatch(m)) for m in caplog.messages] == [True]
        caplog.clear()
        model(rows(50))
    again, line = caplog.messages
    assert "planning again" in again
    assert "a tensor is (50, 8), not (48, 8)" in again
    assert LINE.fullmatch(line)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="actckpt"):
        actckpt.optimize(model, 1.0, batch=rows(48), loss_fn=scalar_loss)
    assert caplog.messages[0].endswith("nothing is recomputed")


def test_without_a_handler_it_is_on_standard_error_and_nothing_on_standard_output() -> None:
    code = """
    import logging, sys, torch, actckpt
    from torch import nn
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(6)])
    if sys.argv[1] == "quiet":
        logging.getLogger("actckpt").setLevel(logging.WARNING)
    actckpt.optimize(model, 1.0, batch=torch.randn(4, 8), loss_fn=torch.sum)
    """
    for how, lines in (("plain", 1), ("quiet", 0)):
        ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code), how], check=True,
                             capture_output=True, text=True)  # fmt: skip
        assert ran.stdout == ""
        assert ran.stderr.count("actckpt: planned in ") == lines, ran.stderr
        assert len(ran.stderr.splitlines()) == lines, ran.stderr


def test_progress_is_for_terminals(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress_shown():
        stage("tracing")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_shown(), progress_shown():
        stage("tracing a step")
        stage("searching")
    out, err = capfd.readouterr()
    assert not out
    assert "searching" in err


def test_the_solver_does_not_print(capfd: pytest.CaptureFixture[str]) -> None:
    """This program's solution is repaired by HiGHS 1.12, which says so with printf."""
    rng = np.random.default_rng(1)
    weights = rng.integers(1, 30, (3, 12)).astype(float)
    values = rng.uniform(1, 2, 12)
    found = milp(
        -values,
        constraints=[optimize.LinearConstraint(weights, -np.inf, np.floor(weights.sum(1) / 2))],
        integrality=np.append(np.ones(10), np.zeros(2)),
        bounds=optimize.Bounds(0, 1),
        options={"node_limit": 50},
    )
    library = ctypes.CDLL(None)
    with without_solver_output():
        library.puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();")
        with without_solver_output():
            library.puts(b"of a thread that knows nothing of solvers")
    library.fflush(None)
    assert found.x is not None
    out, err = capfd.readouterr()
    assert out == "of a thread that knows nothing of solvers\n"
    assert not err


def test_a_budget_that_nothing_fits_leaves_the_model_as_it_was() -> None:
    model, expected = seeded(chain(6))(), seeded(chain(6))()
    before = dict(model.__dict__)
    actckpt.optimize(model, 1e-6, loss_fn=scalar_loss)
    with pytest.raises(actckpt.BudgetError) as caught:
        model(rows(48))
    chained = []
    error: BaseException | None = caught.value
    while error is not None:
        chained.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert len(chained) == 1
    assert model.__dict__.keys() == before.keys()
    assert torch.equal(model(rows(48)), expected(rows(48)))
    with pytest.raises(actckpt.PlanError, match="not optimized"):
        actckpt.report(model)


def test_two_sizes_have_one_unit() -> None:
    assert format_change(6_700_000_000, 5_300_000_000) == "6.70 → 5.30 GB"
    assert format_change(1_250_000_000, 90_000_000) == "1.25 → 0.09 GB"
    assert format_change(999, 5) == "999 → 5 B"
