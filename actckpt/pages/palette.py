"""The colours of what memory is for, in figures and on pages, light or dark."""

from __future__ import annotations

# what no plan can change in greys and violet, what it can in colour; lowest in the stack first
COLORS: dict[str, str] = {
    "parameters": "#4a5568",
    "buffers": "#718096",
    "optimizer": "#94a3b8",
    "batch": "#c3cedb",
    "constants": "#dbe2ea",
    "gradients": "#8b7bb8",
    "activations": "#2a78b5",
    "saved": "#2a78b5",
    "recomputed": "#58b09c",
    "temporaries": "#f2b45c",
    "workspace": "#f7d794",
}
# of names that are not among them
OTHER = ("#a3a3a3", "#bdbdbd", "#d4d4d4")
