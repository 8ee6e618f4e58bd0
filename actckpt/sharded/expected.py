"""What ranks' manifests list of tensors if every rank does what the plan says, byte for byte."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from actckpt.checkpoint.names import share_file
from actckpt.sharded.assignment import WRITES, Task
from actckpt.sharded.layout import Box, Layout


@dataclass(frozen=True, slots=True)
class Table:
    """The list of one rank's tensors.

    Args:
        digest: of its lines, as `without_table` gives them.
        files: that it speaks of.
    """

    digest: bytes
    files: frozenset[str]


def digest_of(lines: bytes) -> bytes:
    """As in `Table`."""
    return bytes(xxhash.xxh3_128_digest(lines))


def tables(layouts: Sequence[Layout], tasks: Sequence[Task]) -> list[Table]:
    """By rank. O(ranks x tensors), some half a microsecond each."""
    named: dict[int, list[tuple[str, str, str]]] = {}
    found = []
    for rank, (layout, task) in enumerate(zip(layouts, tasks, strict=True)):
        names = named.setdefault(id(layout.names), [])
        if not names:
            names += map(_named, layout.names)
        used: set[str] = set()
        lines = ",".join(_lines(rank, layout, task, names, used))
        found.append(Table(digest_of(lines.encode("ascii")), frozenset(used)))
    return found


def _lines(
    rank: int, layout: Layout, task: Task, names: list[tuple[str, str, str]], used: set[str]
) -> Iterator[str]:
    """A line for every tensor that the rank writes; the files that are spoken of go to ``used``."""
    boxes = [_described(box) for box in layout.boxes]
    files = {item: share_file(item, rank) for item in {item for item, _, _ in names}}
    for (item, before, key), which, letter in zip(names, layout.which, task.todo, strict=True):
        box = boxes[which]
        if letter == WRITES and box is not None:
            file = files[item]
            used.add(file)
            yield f'{before}{box[0]}{file}", "name": {key}{box[1]}'


def _named(name: str) -> tuple[str, str, str]:
    """The item of a tensor, how its line begins, and its name in a file."""
    item, _, key = name.partition("/")
    return item, f"\n  {json.dumps(name)}: ", json.dumps(key)


def _described(box: Box) -> tuple[str, str] | None:
    """What stands before the file and after the name; None of a part that is empty."""
    if not math.prod(box.part) and not box.is_whole:
        return None
    return (
        f'{{"dtype": {json.dumps(box.dtype)}, "shape": {json.dumps(box.shape)}, '
        '"chunks": [{"file": "',
        f', "offset": {json.dumps(box.offset)}, "shape": {json.dumps(box.part)}}}]}}',
    )
