"""What an experiment leaves behind: JSON lines and Markdown, with all that they depend on."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def circumstances(versions: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """What the numbers depend on: the command, the versions, the machine, and ``more``.

    Args:
        versions: of the report of a plan made in the same environment.
    """
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "hardware": hardware(),
        "versions": dict(versions),
        **more,
    }


def hardware() -> str:
    """The processor, how many of its cores are here, and the memory."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # not Linux
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{name}, {os.cpu_count()} cores, {memory / 1e9:.0f} GB"


def write_json_lines(
    name: str,
    about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    folder: Path = FOLDER,
) -> Path:
    """The file with the circumstances as its first line and every row as another."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    lines = [json.dumps(line, allow_nan=False) for line in ({"about": dict(about)}, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_markdown(name: str, about: Mapping[str, Any], *parts: str, folder: Path = FOLDER) -> Path:
    """The file with ``parts`` as paragraphs, the circumstances last."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    versions = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
    rest = {k: v for k, v in about.items() if k not in ("command", "hardware", "versions")}
    foot = [
        f"`{about['command']}` on {about['hardware']}.",
        f"Versions: {versions}.",
        *(f"{key.replace('_', ' ').capitalize()}: {value}." for key, value in rest.items()),
    ]
    path.write_text("\n\n".join([*parts, *foot]) + "\n", encoding="utf-8")
    return path


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if not i else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(line(cells) for cells in (columns, rule, *rows))
