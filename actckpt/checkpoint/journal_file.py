"""A run's journal as a file: read from its beginning, and cut back with the checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from actckpt.checkpoint.files import Files, Source
from actckpt.checkpoint.journal_lines import (
    Again,
    Head,
    Record,
    Saved,
    Step,
    parsed_line,
)
from actckpt.checkpoint.names import SAVING, journal_file, unique

_PIECE_BYTES = 1 << 20
_STEP = re.compile(rb'\{"branch":"[0-9a-f]+","step":(\d+),')


@dataclass(slots=True)
class Expected:
    """What a journal holds of the steps after a checkpoint.

    Args:
        steps: by number, each with what bits depended on when it was made.
        branch: the last one in the file, where the steps are its newest; else "".
        versions: of that branch.
        torn: whether the file ends within a line.
        damaged: lines that are none that can be read.
        known: whether the journal knows the checkpoint.
    """

    steps: dict[int, tuple[Mapping[str, str], Step]] = field(default_factory=dict)
    branch: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    torn: bool = False
    damaged: int = 0
    known: bool = False


@dataclass(slots=True)
class Lines:
    """The lines of a journal, in order.

    Attributes:
        torn, damaged: as in `Expected`, of what was read so far.
    """

    source: Source
    torn: bool = False
    damaged: int = 0

    def __iter__(self) -> Iterator[tuple[Record, bytes]]:
        """Each record, with its line."""
        for line in self.raw():
            record = parsed_line(line)
            if record is not None:
                yield record, line
            elif line:
                self.damaged += 1

    def raw(self) -> Iterator[bytes]:
        """Each line, without its end, sound or not."""
        rest = b""
        left = self.source.size_bytes
        while left:
            piece = rest + self.source.read(min(left, _PIECE_BYTES))
            left = self.source.size_bytes - self.source.read_bytes
            *lines, rest = piece.split(b"\n")
            yield from lines
        self.torn = bool(rest)
        self.damaged += self.torn


def path_of(directory: str, rank: int = 0) -> str:
    """Of the journal of the run in a directory."""
    return f"{directory}/{journal_file(rank)}"


def read_expected(files: Files, directory: str, serial: int, step: int, rank: int = 0) -> Expected:
    """What a journal holds of the steps after a checkpoint; nothing where there is no journal.

    Only the branch that the checkpoint is of counts, as far as it is without a gap in its history.

    Raises:
        OSError: it cannot be read.
    """
    path = path_of(directory, rank)
    if files.status(path) is None:
        return Expected()
    with files.reading(path) as source:
        lines = Lines(source)
        found = _expected(lines, serial, step)
        found.torn, found.damaged = lines.torn, lines.damaged
    return found


def _expected(lines: Lines, serial: int, after: int) -> Expected:
    answer = Expected()
    head: Head | None = None
    steps: dict[int, tuple[Mapping[str, str], Step]] = {}
    known = False
    for record, _ in lines:
        if isinstance(record, Head):
            ends = record.after < after or record.after > max(steps, default=after)
            if known and ends:  # what follows is of another run of the same steps
                answer, known = Expected(steps, known=True), False
            steps = {} if ends else {k: v for k, v in steps.items() if k <= record.after}
            head = record
        elif head is None or record.branch != head.branch:
            # the line that said what these are is lost
            if known:
                answer, known = Expected(steps, known=True), False
            head, steps = None, {}
        elif isinstance(record, Saved) and (record.serial, record.step) == (serial, after):
            known = True
        elif isinstance(record, Step) and record.step > after:
            steps[record.step] = head.versions, record
    if known and head is not None:
        return Expected(steps, head.branch, head.versions, known=True)
    return answer


def cut_back(
    files: Files, directory: str, oldest: int, serials: frozenset[int], rank: int = 0
) -> None:
    """Drops what no checkpoint needs any more: steps up to the oldest one's, and other saves.

    Args:
        oldest: the least step of a checkpoint that is still there.
        serials: of those that are.

    Raises:
        OSError, EOFError: it could not; the journal is as it was.
    """
    path = path_of(directory, rank)
    if files.status(path) is None:
        return
    new = f"{directory}/{unique(SAVING, journal_file(rank))}"
    with files.reading(path) as source:
        kept = _kept(Lines(source), oldest, serials)
        if sum(len(line) + 1 for line in kept) == source.size_bytes:
            return
    try:
        fd = files.open_to_append(new)
        try:
            files.append(fd, b"".join(line + b"\n" for line in kept))
        finally:
            files.close(fd)
        files.rename(new, path)
    except BaseException:
        with suppress(OSError):
            files.remove_tree(new)
        raise


def _kept(lines: Lines, oldest: int, serials: frozenset[int]) -> list[bytes]:
    kept: list[bytes] = []
    head = False  # whether what is kept ends in one
    for line in lines.raw():
        # nearly all are of this kind, and need not be read for that
        if (found := _STEP.match(line)) is not None:
            stays = int(found[1]) > oldest
        else:
            record = parsed_line(line)
            stays = record is not None
            if isinstance(record, Saved):
                # the newest is not among those that are there when it is being written
                stays = record.serial in serials or record.serial > max(serials, default=0)
            elif isinstance(record, Again):
                stays = record.last > oldest
            elif isinstance(record, Head):
                if head:
                    kept.pop()  # nothing was kept of that branch
                kept.append(line)
                head = True
                continue
        if stays:
            kept.append(line)
            head = False
    return kept
