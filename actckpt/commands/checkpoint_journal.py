"""``actckpt checkpoint journal RUN``: what was seen of a run's steps, and of those made again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from actckpt.checkpoint.discovery import discover
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.journal_file import Lines, path_of
from actckpt.checkpoint.journal_lines import Again, Head, Saved, Step
from actckpt.checkpoint.local_path import local_path
from actckpt.commands.parsers import add_command
from actckpt.errors import CheckpointError
from actckpt.units import format_bytes


def add_parser(commands: Any) -> None:
    """Add this command to ``commands``."""
    parser = add_command(
        commands,
        "journal",
        example="actckpt checkpoint journal runs/mine --last 20",
        about="the steps since the oldest checkpoint, and whether those made again came out alike",
        description="What a Checkpointer has seen of its steps. Exit status 1 if a step that was "
        "made again came out otherwise.",
    )
    parser.add_argument("directory", type=Path, metavar="RUN", help="a Checkpointer's directory")
    parser.add_argument("--last", type=int, default=5, metavar="N", help="steps to print")
    parser.set_defaults(run=print_journal)


def print_journal(args: argparse.Namespace) -> int:
    """0, after printing a journal; 1 where a step that was made again came out otherwise.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    files, directory = Files(), str(local_path(args.directory))
    steps: dict[int, Step] = {}
    said: list[str] = []
    differs = False
    head: Head | None = None
    try:
        if files.status(path_of(directory)) is None:
            raise CheckpointError(
                f"{directory} holds no journal: a Checkpointer begins one with the first step "
                "after its first checkpoint"
            )
        with files.reading(path_of(directory)) as source:
            size_bytes = source.size_bytes
            lines = Lines(source)
            for record, _ in lines:
                if isinstance(record, Head):
                    steps = {k: v for k, v in steps.items() if k <= record.after}
                    head = record
                    said.append(_head(record))
                elif isinstance(record, Saved):
                    said.append(f"step {record.step}: saved as number {record.serial}")
                elif isinstance(record, Again):
                    differs |= record.difference is not None
                    said.append(_again(record))
                elif head is not None and record.branch == head.branch:
                    steps[record.step] = record
    except (OSError, EOFError) as error:
        raise CheckpointError(f"{path_of(directory)} cannot be read: {error}") from error
    for line in said:
        print(line)
    for step in sorted(steps)[-args.last :] if args.last > 0 else []:
        print(_step(steps[step]))
    print(f"{len(steps)} steps{_span(steps)}, {format_bytes(size_bytes)}")
    if lines.damaged:
        print(f"{lines.damaged} lines are damaged or torn, and left out")
    print(_next(files, directory, steps))
    return 1 if differs else 0


def _head(head: Head) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in head.versions.items())
    return f"after step {head.after}: branch {head.branch} ({versions})"


def _again(again: Again) -> str:
    what = f"steps {again.first} to {again.last}, made again"
    if again.difference is None:
        return f"{what}: as they were"
    return f"{what}: {again.difference}"


def _step(step: Step) -> str:
    parts = [f"step {step.step}:"]
    if step.batches is not None:
        count = "batch" if step.batches[1] == 1 else f"{step.batches[1]} batches"
        parts.append(f"{count} {step.batches[0]}")
    parts += [f"random {name} {digest}" for name, digest in step.random.items()]
    parts += [f"{name}={text}" for name, text in step.metrics.items()]
    if step.weights is not None:
        parts.append(f"weights {step.weights[1]}")
    return "  ".join(parts)


def _span(steps: dict[int, Step]) -> str:
    return f", {min(steps)} to {max(steps)}" if steps else ""


def _next(files: Files, directory: str, steps: dict[int, Step]) -> str:
    found = discover(files, directory).checkpoints
    if not found:
        return "no checkpoint: a resumed run would begin anew"
    after = sum(step > found[0].step for step in steps)
    return (
        f"the newest checkpoint is of step {found[0].step}: a resumed run would make {after} of "
        "these steps again, and compare them"
    )
