"""A model card: what a run says of the weights that it made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from actckpt.exporting.source import Source

NAME = "README.md"


def model_card(source: Source, library: str) -> str:
    """The text of ``README.md``: front matter, and a table of the run's facts.

    Args:
        library: what loads the weights, as the Hub names it.
    """
    name = type(source.model).__name__
    lines = ["---", f"library_name: {library}", "tags:", "- actckpt", "---", "", f"# {name}", ""]
    lines += ["Exported by actckpt; every file's checksum is in `actckpt-export.json`.", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in _facts(source)]
    return "\n".join(lines) + "\n"


def _facts(source: Source) -> Iterator[tuple[str, Any]]:
    table, facts = source.table, source.table.facts
    again = {name for group in table.tied for name in group[1:]}
    own = (w for n, w in table.weights.items() if w.role == "parameter" and n not in again)
    count = sum(w.tensor.numel() for w in own)
    yield "parameters", f"{count:,}"
    if "step" in facts:
        yield "step", facts["step"]
        yield "position", "epoch {epoch}, batch {batch}".format(**facts["position"])
    if facts.get("tag"):
        yield "tag", facts["tag"]
    for section in ("metrics", "budget", "config", "versions"):
        for key, value in facts.get(section, {}).items():
            yield f"{section}: {key}", value


def _cell(value: Any) -> str:
    return str(value).replace("\n", " ").replace("|", "\\|")
