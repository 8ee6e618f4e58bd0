"""What checkpoints on disk cost: saving, restoring, verifying, and the journal beside them."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.measured.kept import Kept
from experiments.results import markdown_table

RATIOS = {
    "stall / memcpy, tensor by tensor": "training stops, over a copy tensor by tensor",
    "stall / memcpy, in one piece": "training stops, over a copy in one piece",
    "durable / dd": "durable and verified, over `dd conv=fsync`",
    "durable, background=False / dd": "the same without a thread",
    "verification / dd": "reading all of it back to verify it, over `dd`",
    "restore / load_file, xxh3": "restoring, over safetensors' loading with the same hash",
    "training step during a save / without": "a step while a save is written, over one without",
}


def speeds(kept: Sequence[tuple[str, Kept]]) -> str:
    """Ratios of medians: one column a state."""
    found = [next(row["ratios"] for row in k.rows if "ratios" in row) for _, k in kept]
    lines = [
        [label, *(f"{ratios[name]:.2f}" for ratios in found)] for name, label in RATIOS.items()
    ]
    return markdown_table(["", *(title for title, _ in kept)], lines)


def beside(kept: Kept) -> str:
    """Seconds beside other libraries, in one process."""
    lines = [
        [row["arm"], f"{row['stall_s']['median']:.2f} s", f"{row['durable_s']['median']:.2f} s"]
        for row in kept.rows
        if "durable_s" in row and not row["arm"].endswith("again")
    ]
    return markdown_table(["", "training stops", "durable"], lines)


def journal(kept: Kept) -> str:
    """What taking down every step costs."""
    lines = [
        [
            row["model"],
            f"{row['parameters'] / 1e6:.1f} M",
            f"{1000 * row['loop_s']:.1f} ms",
            f"{1e6 * row['journal_s']:.0f} µs",
            f"{100 * row['share']:.2f} %",
        ]
        for row in kept.rows
    ]
    return markdown_table(["", "parameters", "one step", "the journal", "share"], lines)
