"""What is in the journal of a run's directory."""

from __future__ import annotations

from pathlib import Path

from actckpt.checkpoint.journal_lines import Record, parsed_line


def lines(directory: Path) -> list[bytes]:
    """Those that are not empty, without their ends."""
    return [line for line in (directory / "journal.jsonl").read_bytes().split(b"\n") if line]


def records(directory: Path) -> list[Record]:
    """Of the lines that can be read."""
    return [found for line in lines(directory) if (found := parsed_line(line)) is not None]
