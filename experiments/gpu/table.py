"""What `experiments.gpu` leaves behind: its rows as JSON lines and as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.results import circumstances, markdown_table, write_json_lines, write_markdown

Row = dict[str, Any]


def write(folder: Path, rows: Sequence[Row], what: Mapping[str, str], tests: str = "") -> None:
    """gpu.jsonl and gpu.md in the folder.

    Args:
        what: model -> its sizes.
        tests: what the CUDA tests came to, "" where they were not run.
    """
    versions: dict[str, str] = next((row["versions"] for row in rows if "versions" in row), {})
    about = circumstances(
        versions,
        models="; ".join(f"{name}: {text}" for name, text in what.items()),
        budgets="on the whole step: the untouched peak less a share of its activations",
        allocated="the allocator's peak of a step with the optimizer's, without what was there "
        "before and is no resident of it (cuBLAS's workspace)",
        time="CUDA events around forward and backward, arms in turn, medians and quartiles of the "
        "ratios round by round",
    )
    if torch.cuda.is_available():
        about["hardware"] = f"{torch.cuda.get_device_name()}; {about['hardware']}"
        about["versions"] = {"torch": torch.__version__, **about["versions"]}
    if tests:
        about["cuda_tests"] = tests
    kept = [{k: v for k, v in row.items() if k != "versions"} for row in rows]
    write_json_lines("gpu", about, kept, folder=folder)
    failed = [f"- {line}" for line in failures(rows)]
    write_markdown(
        "gpu", about, "# On a GPU", table(rows), "Failed:" if failed else "Nothing failed.",
        *failed, folder=folder,
    )  # fmt: skip


def failures(rows: Sequence[Row]) -> list[str]:
    """What failed, went over its budget, or made other gradients where the untouched one does not.

    Where untouched steps differ from each other, those of deterministic kernels are compared.
    """
    found = []
    for row in rows:
        where = f"{row['model']}, {row['case']}"
        if "failed" in row:
            found.append(f"{where}: {row['failed']}")
        if row.get("within") is False:
            over = row["allocated_bytes"] / row["budget_bytes"] - 1
            found.append(f"{where}: {100 * over:.1f} % over its budget")
        own = next((r for r in rows if r["model"] == row["model"] and r["case"] == "untouched"), {})
        if row.get("equal") is False and own.get("equal") is True and row["case"] != "torch":
            found.append(f"{where}: other gradients or buffers than untouched")
        if row["case"] == "deterministic" and row["equal"].get("again") is True:
            found += [
                f"{row['model']}, {arm}, deterministic: "
                + (equal if isinstance(equal, str) else "other gradients or buffers")
                for arm, equal in row["equal"].items()
                if equal is not True and arm != "torch"
            ]
    return found


def set_aside(folder: Path, device: str) -> None:
    """Renames the results of another device after it: two are never mixed, and none is lost."""
    path = folder / "gpu.jsonl"
    if not path.exists():
        return
    about = json.loads(path.read_text(encoding="utf-8").splitlines()[0])["about"]
    theirs = str(about["hardware"]).split(";")[0]
    if theirs == device:
        return
    slug = re.sub(r"[^a-z0-9]+", "_", theirs.lower()).strip("_")
    for suffix in ("jsonl", "md"):
        if (folder / f"gpu.{suffix}").exists():
            (folder / f"gpu.{suffix}").rename(folder / f"gpu_{slug}.{suffix}")


def table(rows: Sequence[Row]) -> str:
    columns = [
        "", "budget", "predicted peak", "allocated", "asked for", "reserved", "within", "planning",
        "predicted overhead", "measured overhead", "predicted step", "measured step",
        "gradients and buffers",
    ]  # fmt: skip
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for model in models:
        cases = {row["case"]: row for row in rows if row["model"] == model}
        times, sure = cases.pop("times", {}), cases.pop("deterministic", {})
        lines += [_cells(row, times, sure) for row in cases.values()]
    return markdown_table(columns, lines)


def _cells(row: Row, times: Row, sure: Row) -> list[str]:
    case = row["case"]
    over = times.get("over_untouched", {}).get(case)
    step_s = times.get("step_s", {}).get(case)
    asked, budget = row.get("asked_bytes"), row.get("budget_bytes")
    refused = " (smallest)" if asked is not None and budget is not None and budget > asked else ""
    predicted = row.get("predicted_overhead")
    return [
        f"{row['model']}, {case}",
        _gb(budget) + refused,
        _gb(row.get("predicted_bytes")),
        _gb(row.get("allocated_bytes")),
        _gb(row.get("requested_bytes")),
        _gb(row.get("reserved_bytes")),
        {True: "yes", False: "NO"}.get(row.get("within"), ""),  # type: ignore[arg-type]
        f"{row['plan_s']:.1f} s" if "plan_s" in row else "",
        "" if predicted is None else f"{100 * predicted:.1f} %",
        ""
        if over is None
        else "{1:.1f} % ({0:.1f}–{2:.1f})".format(*(100 * (x - 1) for x in over)),
        f"{1e3 * row['predicted_step_s']:.1f} ms" if "predicted_step_s" in row else "",
        "" if step_s is None else f"{1e3 * step_s:.1f} ms",
        _equal(
            row.get("equal"), sure.get("equal", {}).get("again" if case == "untouched" else case)
        ),
    ]


def _equal(plain: bool | None, deterministic: bool | str | None) -> str:
    if plain is None:
        return ""
    text = "equal" if plain else "differ"
    if deterministic is None:
        return text
    return f"{text}; deterministic: {'equal' if deterministic is True else 'differ'}"


def _gb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.3f} GB"
