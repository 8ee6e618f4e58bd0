"""The cases of one model: untouched, torch's function, plans by budget, the data sheet's, times."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

import actckpt
from experiments.gpu.subjects import BLOCKS, MODELS
from experiments.gpu.trial import Row, Trial, failure_of
from experiments.timing import ratio

SHARES = (0.5, 0.3, 0.75)  # in the order in which they are planned, as far as time allows


def run(name: str, path: Path, rounds: int, until: float) -> None:
    """Adds the rows of one model to the file, each as soon as it is there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trial = Trial(name, device)
    rows: dict[str, Row] = {}

    @contextmanager
    def case(what: str) -> Iterator[Row]:
        row = rows[what] = {"model": name, "case": what}
        try:
            yield row
        except Exception as error:
            traceback.print_exc()
            row["failed"] = failure_of(error)
            trial.clear()
        add_row(path, row)

    with case("untouched") as row:
        row |= trial.peaks(trial.model)
        trial.equal(trial.model)
        row["equal"] = trial.equal(trial.arms["again"])
        row["resident_bytes"] = resident = trial.resident_bytes()
        gradients = sum(p.numel() * p.element_size() for p in trial.model.parameters())
        activations = row["allocated_bytes"] - resident - gradients
    whole = rows["untouched"]["allocated_bytes"]
    budgets = {share: whole - round((1 - share) * activations) for share in SHARES}

    def planned(row: Row, what: str, budget_bytes: int, policy: Any = "auto") -> None:
        model = trial.copied()
        row["asked_bytes"] = budget_bytes
        begin = time.perf_counter()
        make = partial(
            actckpt.optimize, model, batch=trial.batch, optimizer=trial.optimizer, policy=policy
        )
        try:
            make(budget_gb=budget_bytes / 1e9)
        except actckpt.BudgetError as error:
            if error.smallest_bytes is None:
                raise
            budget_bytes = error.smallest_bytes
            make(budget_gb=budget_bytes / 1e9)
        row |= {"plan_s": time.perf_counter() - begin, "budget_bytes": budget_bytes}
        report = actckpt.report(model)
        row |= _figures(report)
        row["equal"] = trial.equal(model)
        row |= trial.peaks(model)
        row["within"] = row["allocated_bytes"] <= budget_bytes
        trial.arms[what] = model

    with case("torch") as row:
        model = trial.copied()
        for module in model.modules():
            if type(module).__name__ in BLOCKS:
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        row["equal"] = trial.equal(model)
        row |= trial.peaks(model)
        trial.arms["torch"] = model
    first, *others = (f"share {share}" for share in SHARES)
    asked = {first: budgets[SHARES[0]]}
    if "allocated_bytes" in rows["torch"]:
        asked["at torch's peak"] = rows["torch"]["allocated_bytes"]
    asked |= dict(zip(others, list(budgets.values())[1:], strict=True))
    sheet: subprocess.Popen[bytes] | None = None
    for what, budget_bytes in asked.items():
        if what != first and time.time() > until:
            continue
        with case(what) as row:
            planned(row, what, budget_bytes)
        if what == first:  # it plans beside the others
            sheet = _sheet(name, device, row.get("budget_bytes", budget_bytes), path.parent)
    assert sheet is not None
    with case("data sheet") as row:
        report = _finished(sheet, path.parent / f"{name}-sheet.json")
        row |= {f"sheet_{key}": value for key, value in _figures(report).items()}
        planned(row, "data sheet", rows[first]["budget_bytes"], lambda *_: report.plan)
    with case("times") as row:
        times = trial.timed(rounds)
        row["times_s"] = times
        row["step_s"] = {arm: statistics.median(found) for arm, found in times.items()}
        row["over_untouched"] = {
            arm: [r.low, r.median, r.high]
            for arm, r in ((a, ratio(t, times["untouched"])) for a, t in times.items())
        }
    if not rows["untouched"].get("equal", False):
        with case("deterministic") as row:
            row["equal"] = trial.equal_deterministic(trial.arms)


def _figures(report: actckpt.Report) -> Row:
    whole, planned = report.baseline.predicted, report.planned.predicted
    return {
        "predicted_bytes": planned.peak_bytes,
        "predicted_whole_bytes": whole.peak_bytes,
        "predicted_step_s": planned.step_s,
        "predicted_whole_step_s": whole.step_s,
        "predicted_overhead": planned.step_s / whole.step_s - 1,
        "regions": sum(1 for _ in report.plan.walk()),
        "bursts": sum(1 for _ in report.plan.walk_bursts()),
        "versions": report.versions,
    }


def _sheet(
    name: str, device: torch.device, budget_bytes: int, folder: Path
) -> subprocess.Popen[bytes]:
    """The process that plans from the data sheet."""
    here = torch.cuda.get_device_name() if device.type == "cuda" else ""
    kind = next((k for k in ("h200", "a100", "b200") if k.upper() in here), "h100-80gb")
    command = [
        sys.executable, "-m", "actckpt.cli", "plan", f"experiments.gpu.subjects:{name}",
        "--device", kind, "--optimizer", MODELS[name][2], "--budget-gb", f"{budget_bytes}B",
        "--save", str(folder / f"{name}-sheet.json"),
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _finished(process: subprocess.Popen[bytes], saved: Path) -> actckpt.Report:
    _, errors = process.communicate(timeout=120)
    if process.returncode:
        raise RuntimeError(errors.decode()[-500:])
    return actckpt.Report.from_json(saved.read_text(encoding="utf-8"))


def add_row(path: Path, row: Row) -> None:
    """Adds a row, at once on disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The rows so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
