"""What steps took: chains of blocks, one GPU, every model x policy x budget."""

from __future__ import annotations

from experiments.measured.kept import Kept, Row
from experiments.results import markdown_table

ARMS = {
    "untouched": "untouched",
    "full": "`full`",
    "sqrt": "`sqrt`",
    "log": "`log`",
    "torch each block": "`torch.utils.checkpoint` on each block",
    "torch sequential": "`checkpoint_sequential`, √n segments",
    "torch nested": "`torch.utils.checkpoint`, nested",
}
CASES = {
    "untouched": "untouched",
    "torch": "`torch.utils.checkpoint` on every block",
    "share 0.75": "75 %",
    "share 0.5": "50 %",
    "share 0.3": "30 %",
    "at torch's peak": "at torch's peak",
}
ON_GPU = {
    "gpt2": "GPT-2 medium",
    "resnet152": "ResNet-152",
    "resnet152, expandable segments": "ResNet-152, expandable segments",
    "llama": "Llama, 1.2 B",
    "unet": "U-Net",
    "vit": "ViT-L/16",
}


def chain(kept: Kept) -> str:
    """Live units at each depth, and the time at the largest."""
    depths = sorted({row["depth"] for row in kept.rows})
    found = {(row["arm"], row["depth"]): row for row in kept.rows}
    lines = [
        [
            label,
            *(f"{found[arm, depth]['units']:.1f}" for depth in depths),
            f"{found[arm, depths[-1]]['ratio']:.2f}",
        ]
        for arm, label in ARMS.items()
    ]
    columns = ["live activations", *(f"n = {d}" for d in depths), f"time, n = {depths[-1]}"]
    return markdown_table(columns, lines)


def gpu(kept: Kept) -> str:
    """Every plan that ran on the one GPU tried."""
    times: dict[str, Row] = {
        row["model"]: row["over_untouched"] for row in kept.rows if row["case"] == "times"
    }
    lines = []
    for row in kept.rows:
        if row["case"] not in CASES or row["model"] not in ON_GPU:
            continue
        over = times.get(row["model"], {}).get(row["case"])
        failed = "failed" in row
        peak = f"{row['allocated_bytes'] / 1e9:.2f}" if "allocated_bytes" in row else "–"
        lines.append(
            [
                f"{ON_GPU[row['model']]}, {CASES[row['case']]}",
                f"{row['budget_bytes'] / 1e9:.2f} GB" if "budget_bytes" in row else "",
                f"{row['predicted_bytes'] / 1e9:.2f}" if "predicted_bytes" in row else "",
                f"{row['failed'].split(':')[0]}" if failed else _within(row, peak),
                f"{100 * row['predicted_overhead']:.0f} %" if "predicted_overhead" in row else "",
                f"{100 * _middle(over) - 100:.0f} %" if over is not None and not failed else "–",
            ]
        )
    columns = ["", "budget", "predicted peak", "allocated", "predicted overhead", "measured"]
    return markdown_table(columns, lines)


def _within(row: Row, peak: str) -> str:
    return peak if row.get("within", True) else f"**{peak}, over**"


def _middle(quartiles: list[float]) -> float:
    return sorted(quartiles)[1]


def grid(kept: Kept) -> str:
    """Every model x policy x scope x budget, by policy."""
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in kept.rows):
        of = [row for row in kept.rows if row["policy"] == policy]
        fits = [row for row in of if row["outcome"] == "fits"]
        worst = max(row["measured_bytes"] / row["budget_bytes"] for row in fits)
        raised = sum(1 for row in of if row["outcome"] == "budget error")
        violations = sum(len(row["violations"]) for row in of)
        lines.append([f"`{policy}`", str(len(fits)), str(raised), f"{worst:.3f}", str(violations)])
    columns = ["", "fit", "`BudgetError`", "worst peak / budget", "violations"]
    return markdown_table(columns, lines)
