"""Plans for accelerators that are not here: how tight they are, and what planning takes.

Every plan is made by ``actckpt plan`` in a process of its own, on shapes alone: no weight is
allocated and nothing is measured on the device. Times and peaks are therefore predictions.

A second table is of the gap at these sizes, at shares of what the untouched step adds.

    python -m experiments.absent_devices [--models NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import actckpt
from experiments.progress import progress
from experiments.results import (
    FOLDER,
    circumstances,
    markdown_table,
    write_json_lines,
    write_markdown,
)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One plan.

    Args:
        scope: "activations" plans what the step adds, as where weights are sharded.
    """

    model: str
    device: str
    budget_gb: float
    optimizer: str = "none"
    scope: str = "step"


# name -> type, settings, batch size, sequence length, dtype
MODELS: dict[str, tuple[str, dict[str, Any], int, int, str]] = {
    "Llama 8B": (
        "llama",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
        2,
        4096,
        "bf16",
    ),
    "Llama 70B": (
        "llama",
        {
            "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
            "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
        2,
        4096,
        "bf16",
    ),
    "GPT-2 medium": ("gpt2", {"n_layer": 24, "n_embd": 1024, "n_head": 16}, 8, 1024, "fp16"),
    "ViT-L/16": (
        "vit",
        {
            "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096,
            "num_attention_heads": 16, "num_labels": 1000,
        },
        64,
        1,
        "bf16",
    ),
    "BERT large": (
        "bert",
        {
            "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096,
            "num_attention_heads": 16,
        },
        16,
        512,
        "bf16",
    ),
    "T5 large": (
        "t5",
        {
            "num_layers": 24, "num_decoder_layers": 24, "d_model": 1024, "d_ff": 4096,
            "num_heads": 16,
        },
        8,
        512,
        "bf16",
    ),
    "Mixtral": (
        "mixtral",
        {
            "num_hidden_layers": 8, "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        },
        2,
        4096,
        "bf16",
    ),
    "ResNet-152": ("resnet", {"num_labels": 1000, "depths": [3, 8, 36, 3]}, 64, 1, "bf16"),
}  # fmt: skip

CASES = (
    Case("Llama 8B", "h100-80gb", 70),
    Case("Llama 8B", "h100-80gb", 60),
    Case("Llama 8B", "h100-80gb", 45),
    Case("Llama 8B", "a100-80gb", 60),
    Case("Llama 8B", "h100-80gb", 75, optimizer="adamw"),
    Case("Llama 8B", "h200", 130, optimizer="adamw"),
    Case("Llama 8B", "mi300x", 130, optimizer="adamw"),
    Case("Llama 70B", "b200", 170),
    Case("Llama 70B", "b200", 100, scope="activations"),
    Case("Llama 70B", "b200", 50, scope="activations"),
    Case("GPT-2 medium", "t4", 14, optimizer="adamw"),
    Case("GPT-2 medium", "rtx-3090", 14, optimizer="adamw"),
    Case("ViT-L/16", "l4", 12, optimizer="adamw"),
)

# where the gap is looked at, at which shares of what the untouched step adds: on an accelerator
# that such a step keeps busy, and once on one that its host cannot keep up with
GAPS = (
    ("GPT-2 medium", "rtx-3090"),
    ("BERT large", "rtx-3090"),
    ("ViT-L/16", "rtx-3090"),
    ("T5 large", "rtx-3090"),
    ("ResNet-152", "rtx-3090"),
    ("Llama 8B", "h100-80gb"),
    ("Mixtral", "h100-80gb"),
    ("BERT large", "h100-80gb"),
)
AMPLE_GB = {"rtx-3090": 20, "h100-80gb": 75}
SHARES = (0.75, 0.5, 0.35, 0.25)


def arguments(case: Case) -> list[str]:
    """What ``actckpt`` is called with."""
    kind, settings, batch_size, seq_len, dtype = MODELS[case.model]
    return [
        "plan", kind, *(f"--set={key}={value}" for key, value in settings.items()),
        "--device", case.device, "--dtype", dtype, "--batch-size", str(batch_size),
        "--seq-len", str(seq_len), "--optimizer", case.optimizer, "--scope", case.scope,
        "--budget-gb", str(case.budget_gb),
    ]  # fmt: skip


def planned(case: Case) -> tuple[dict[str, str], Row]:
    """The versions, and the row of one plan."""
    argv = arguments(case)
    row: Row = asdict(case) | {"command": "actckpt " + " ".join(argv), "fits": True}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        begin = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", "actckpt.cli", *argv, "--save", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stderr is not None
        errors = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        row |= {
            "wall_s": time.perf_counter() - begin,
            "processor_s": usage.ru_utime + usage.ru_stime,
            "resident_bytes": usage.ru_maxrss * 1024,
        }
        if child.returncode:
            if "Raise budget_gb" not in errors:
                raise RuntimeError(errors)
            return {}, row | {"fits": False, "error": errors.splitlines()[-1]}
        report = actckpt.Report.from_json(path.read_text(encoding="utf-8"))
    for arm in ("baseline", "planned"):
        figures = getattr(report, arm).predicted
        row |= {
            f"{arm}_bytes": figures.bounded_bytes(case.scope),
            f"{arm}_step_s": figures.step_s,
        }
    row["overhead"] = row["planned_step_s"] / row["baseline_step_s"] - 1
    row["lower_bound"] = report.lower_bound
    row["regions"] = len(report.regions)
    return report.versions, row


def at_shares(name: str, device: str) -> Iterator[Row]:
    """One model's plans at shares of what its untouched step adds."""
    _, whole = planned(Case(name, device, AMPLE_GB[device], scope="activations"))
    for share in SHARES:
        budget_gb = round(share * whole["baseline_bytes"] / 1e9, 3)
        _, row = planned(Case(name, device, budget_gb, scope="activations"))
        yield row | {"share": share}


def gap_table(rows: list[Row]) -> str:
    """Overhead, bound and gap of each model at each share."""
    columns = [
        "", "device", "budget, %", "budget", "step", "overhead, %", "bound, %", "gap, points",
    ]  # fmt: skip
    return markdown_table(columns, [_gap_cells(row) for row in rows])


def _gap_cells(row: Row) -> list[str]:
    share, budget = f"{100 * row['share']:.0f}", f"{row['budget_gb']:.1f} GB"
    head = [row["model"], row["device"], share, budget]
    if not row["fits"]:
        return [*head, "does not fit", "", "", ""]
    overhead, bound = 100 * row["overhead"], 100 * (row["lower_bound"] or 0.0)
    figures = [f"{overhead:.1f}", f"{bound:.1f}", f"{overhead - bound:.1f}"]
    return [*head, f"{row['planned_step_s']:.2f} s", *figures]


def table(rows: list[Row]) -> str:
    columns = [
        "", "device", "optimizer", "bounds", "budget", "untouched", "planned", "step", "overhead",
        "bound", "planning, processor", "resident",
    ]  # fmt: skip
    return markdown_table(columns, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    head = [row["model"], row["device"], row["optimizer"], row["scope"], f"{row['budget_gb']:g} GB"]
    tail = [f"{row['processor_s']:.1f} s", f"{row['resident_bytes'] / 1e6:.0f} MB"]
    if not row["fits"]:
        return [*head, "", "does not fit", "", "", "", *tail]
    bound = row["lower_bound"]
    return [
        *head,
        f"{row['baseline_bytes'] / 1e9:.1f} GB",
        f"{row['planned_bytes'] / 1e9:.1f} GB",
        f"{row['planned_step_s']:.2f} s",
        f"{100 * row['overhead']:.1f} %",
        "" if bound is None else f"{100 * bound:.1f} %",
        *tail,
    ]


def line(row: Row) -> str:
    verdict = f"+{100 * row['overhead']:.1f} %" if row["fits"] else "does not fit"
    return (
        f"{row['model']} on {row['device']} in {row['budget_gb']:g} GB: {verdict}; "
        f"{row['processor_s']:.1f} s, {row['resident_bytes'] / 1e6:.0f} MB"
    )


def whole(fresh: list[Row], models: set[str]) -> tuple[list[Row], list[Row]]:
    """The rows of plans and of gaps, with those of models that were not asked for."""
    path = FOLDER / "absent_devices.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    earlier = [row for row in map(json.loads, lines) if row["model"] not in models]
    both = sorted([*earlier, *fresh], key=lambda row: list(MODELS).index(row["model"]))
    return [r for r in both if "share" not in r], [r for r in both if "share" in r]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.absent_devices", description=__doc__
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS),
        help="only these, in place of their rows",
    )  # fmt: skip
    models = parser.parse_args().models
    cases = [case for case in CASES if case.model in models]
    gaps = [(name, device) for name, device in GAPS if name in models]
    rows: list[Row] = []
    shares: list[Row] = []
    versions: dict[str, str] = {}
    with progress(len(cases) + len(gaps) * len(SHARES), "absent devices") as done:
        for case in cases:
            found, row = planned(case)
            versions |= found
            rows.append(row)
            done(line(row))
        for name, device in gaps:
            for row in at_shares(name, device):
                shares.append(row)
                done(line(row))
    about = circumstances(
        versions,
        models="; ".join(
            f"{name}: {kind} {settings}, {batch} x {length if kind != 'vit' else 'images'}, {dtype}"
            for name, (kind, settings, batch, length, dtype) in MODELS.items()
        ),
        planning="processor seconds and largest resident memory of the whole `actckpt plan` "
        "process, imports included",
    )
    rows, shares = whole([*rows, *shares], set(models))
    write_json_lines("absent_devices", about, [*rows, *shares])
    write_markdown(
        "absent_devices",
        about,
        "# Devices that are not here",
        "Plans of `auto` made on a build without CUDA, weights never allocated. Peaks, step times "
        "and overheads are predictions from data sheets; none was measured on its device. "
        "Bound: no plan within the budget has less overhead.",
        table(rows),
        "## How far from the optimum",
        "At shares of what the untouched step adds. Gap: percentage points of step time between "
        "the plan and the bound.",
        gap_table(shares),
    )


if __name__ == "__main__":
    main()
