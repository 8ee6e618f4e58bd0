"""What `experiments.gpu` leaves behind: its rows as JSON lines and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.results import circumstances, markdown_table, write_json_lines, write_markdown

Row = dict[str, Any]


def write(folder: Path, rows: Sequence[Row], what: Mapping[str, str]) -> None:
    """gpu.jsonl and gpu.md in the folder.

    Args:
        what: model -> its sizes.
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
    if "cuda" in versions:
        about["hardware"] = f"{versions['device']}; {about['hardware']}"
    kept = [{k: v for k, v in row.items() if k != "versions"} for row in rows]
    write_json_lines("gpu", about, kept, folder=folder)
    failures = [f"- {r['model']}, {r['case']}: {r['failed']}" for r in rows if "failed" in r]
    write_markdown(
        "gpu", about, "# On a GPU", table(rows), "Failed:" if failures else "Nothing failed.",
        *failures, folder=folder,
    )  # fmt: skip


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
