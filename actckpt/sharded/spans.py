"""Which ranks need which blocks of which files, and which of them reads each for all."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

# from this block to before that one
Span = tuple[int, int]
# by file
Spans = dict[str, list[Span]]


@dataclass(frozen=True, slots=True)
class Shared:
    """A block that several ranks need.

    Args:
        ranks: those; each of them has it in the end.
        reader: of those, who reads it, and sends it to the others.
    """

    file: str
    number: int
    ranks: tuple[int, ...]
    reader: int


def spans_of(numbers: Collection[int]) -> list[Span]:
    """Numbers of blocks as spans, in their order."""
    found: list[Span] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number:
            found[-1] = found[-1][0], number + 1
        else:
            found.append((number, number + 1))
    return found


def shared_blocks(wanted: Sequence[Mapping[str, Sequence[Span]]]) -> Iterator[Shared]:
    """The blocks that more than one rank wants, in the order in which all of them go through them.

    They take turns in reading them.

    O(files x spans x ranks that want any of a file).

    Args:
        wanted: by rank.
    """
    turns = count()
    by_file: dict[str, list[tuple[int, Sequence[Span]]]] = {}
    for rank, spans in enumerate(wanted):
        for file, found in spans.items():
            by_file.setdefault(file, []).append((rank, found))
    for file in sorted(by_file):
        ends = {end for _, spans in by_file[file] for span in spans for end in span}
        for begin, end in pairwise(sorted(ends)):
            ranks = tuple(
                rank
                for rank, spans in by_file[file]
                if any(first <= begin and end <= last for first, last in spans)
            )
            if len(ranks) > 1:
                for number in range(begin, end):
                    yield Shared(file, number, ranks, ranks[next(turns) % len(ranks)])
