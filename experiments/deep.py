"""A residual network of 1,001 layers (Chen and others, 2016) in little memory.

Its form for CIFAR, 32 x 32 pixels, is planned and run for real: peak and time beside the untouched
model's, gradients compared. The form for 224 x 224 pixels is planned for a device that is not here.

    python -m experiments.deep [--quick] [--rounds N]
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import actckpt
from experiments.peers.deep import residual
from experiments.peers.models import SEED
from experiments.peers.subject import Subject, cross_entropy
from experiments.peers.trial import tried
from experiments.results import (
    FOLDER,
    circumstances,
    markdown_table,
    write_json_lines,
    write_markdown,
)
from experiments.timing import interleaved, ratio

SHARES = (0.3, 0.15, 0.08)
# 29 layers cannot go so low
QUICK_SHARES = (0.7, 0.5)
# Chen et al.: 48 GB to 7 GB at 30 % more time
ELSEWHERE = ("h100-80gb", "7")

Row = dict[str, Any]


def measured(subject: Subject, shares: tuple[float, ...], rounds: int) -> list[Row]:
    """Plans at shares of the untouched activation peak, run."""
    untouched = copy.deepcopy(subject.model)
    whole, seen = tried(subject, untouched, untouched, None)
    rows: list[Row] = []
    for share in shares:
        model = copy.deepcopy(subject.model)
        begin_s, worked_s = time.perf_counter(), time.process_time()
        row: Row = {"share": share, "what": subject.what, "untouched_bytes": whole.peak_bytes}
        try:
            actckpt.optimize(
                model, share * whole.peak_bytes / 1e9, batch=subject.batch, scope="activations",
                **subject.loss,
            )  # fmt: skip
        except actckpt.BudgetError as error:
            rows.append({**row, "refused": str(error)})
            continue
        row["optimize_s"] = time.perf_counter() - begin_s
        row["optimize_cpu_s"] = time.process_time() - worked_s
        report = actckpt.report(model)
        predicted = report.planned.predicted.step_s / report.baseline.predicted.step_s
        arm, _ = tried(subject, model, model, seen)
        times = interleaved({"untouched": whole.run, "ours": arm.run}, rounds=rounds, warmup=1)
        slower = ratio(times["ours"], times["untouched"])
        row |= {
            "peak": arm.peak_bytes / whole.peak_bytes,
            "predicted": predicted,
            "time": slower.median,
            "low": slower.low,
            "high": slower.high,
            "gradients": arm.gradients,
        }
        rows.append(row)
    return rows


class WithLoss(nn.Module):
    """A classifier that returns its loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": cross_entropy(self.inner(pixels), target)}


def large() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """What `actckpt plan` is asked about."""
    return _target(111)


def small() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The same of 29 layers."""
    return _target(3)


def _target(blocks: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    subject = residual(blocks, batch=32, size=224)
    assert subject.target is not None
    return WithLoss(subject.model), {"pixels": subject.batch, "target": subject.target}


def elsewhere(quick: bool) -> Row:
    """The same network on 224 x 224 pixels, planned for a device that is not here."""
    device, budget_gb = ELSEWHERE
    row: Row = {"device": device, "budget_gb": budget_gb}
    target = f"experiments.deep:{'small' if quick else 'large'}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "actckpt", "plan", target, "--device", device,
             "--budget-gb", budget_gb, "--optimizer", "sgd", "--save", str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        row["plan_cpu_s"] = sum(after[:2]) - sum(before[:2])
        if done.returncode:
            return {**row, "refused": done.stderr.strip()[-600:]}
        row["report"] = json.loads(path.read_text(encoding="utf-8"))
        row["shown"] = done.stdout
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.deep", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="29 layers; writes to runs/deep")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, at least 2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    subject = residual(3 if options.quick else 111, batch=16, size=32)
    subject.model.train()
    shares = QUICK_SHARES if options.quick else SHARES
    rows = measured(subject, shares, options.rounds)
    far = elsewhere(options.quick)
    about = circumstances({"torch": torch.__version__, "actckpt": actckpt.__version__}, seed=SEED)
    folder = Path("runs/deep") if options.quick else FOLDER
    columns = ["budget, %", "peak, %", "time", "predicted", "gradients", "optimize, s"]
    lines = [
        [f"{100 * row['share']:.0f}", "refused", "", "", "", ""]
        if "refused" in row
        else [
            f"{100 * row['share']:.0f}",
            f"{100 * row['peak']:.1f}",
            f"{row['time']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
            f"{row['predicted']:.2f}",
            "equal" if row["gradients"] == 0 else f"{row['gradients']}",
            f"{row['optimize_cpu_s']:.0f}",
        ]
        for row in rows
    ]
    there = far.get("refused") or far["shown"]
    write_json_lines("deep", about, [*rows, far], folder=folder)
    write_markdown(
        "deep",
        about,
        "# A residual network of many layers",
        f"{subject.what}: peak and time over the untouched model's, measured; processor time of "
        "`optimize`, tracing and the dry run included.",
        markdown_table(columns, lines),
        f"32 x 224 x 224 pixels under {far['budget_gb']} GB, planned for {far['device']} in "
        f"{far['plan_cpu_s']:.0f} s of processor time, nothing run:",
        f"```\n{there}\n```",
        folder=folder,
    )
    print(markdown_table(columns, lines), there, sep="\n")


if __name__ == "__main__":
    main()
