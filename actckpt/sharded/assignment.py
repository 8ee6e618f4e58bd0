"""Who writes what of a state that many ranks hold, each byte once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from actckpt.errors import CheckpointSaveError
from actckpt.sharded.contents import APART
from actckpt.sharded.holders import Holders, size_bytes
from actckpt.sharded.layout import Layout

WRITES, _SKIPS, _OWNS = "wso"


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one rank does not write, or writes as its own.

    Args:
        skipped: names of tensors whose part here another rank writes.
        own: names of tensors that it has otherwise than the first rank that has them.
        trees: items whose tree is not that of rank 0.
        without: items that rank 0 has, and this one has not.
    """

    skipped: tuple[str, ...]
    own: tuple[str, ...]
    trees: tuple[str, ...]
    without: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """What a rank does with each of its tensors, save after save.

    Args:
        todo: a letter for every name of its layout.
        groups: for every compared part, with which others its content is told; or `APART`.
    """

    todo: str
    groups: tuple[int, ...]

    def digest(self, layout: Sequence[str]) -> str:
        """What tells it from every other.

        Args:
            layout: the digests of that which it is for.
        """
        return xxhash.xxh3_128_hexdigest(json.dumps([*layout, self.todo, self.groups]).encode())

    def to_json(self) -> dict[str, Any]:
        """As a message."""
        return {"todo": self.todo, "groups": self.groups}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        """From what `to_json` gave."""
        return cls(data["todo"], tuple(data["groups"]))

    def assignment(
        self, layout: Layout, trees: Sequence[str], without: Sequence[str]
    ) -> Assignment:
        """By names."""

        def named(letter: str) -> tuple[str, ...]:
            pairs = zip(layout.names, self.todo, strict=True)
            return tuple(name for name, found in pairs if found == letter)

        return Assignment(named(_SKIPS), named(_OWNS), tuple(trees), tuple(without))


def owners(holders: Holders, number: int, digest: Callable[[int], bytes | str]) -> tuple[int, ...]:
    """The ranks that have a part otherwise than the first.

    Args:
        number: of the part.
        digest: of what a rank that is among its ``compared`` holds in it.

    Raises:
        CheckpointSaveError: the part is one of many, of which all ranks have to have the same.
    """
    name, part = holders.parts[number]
    first = part.ranks[0]
    same = {*part.alike}
    if part.box.compared:
        expected = digest(first)
        same = {rank for rank in same if digest(rank) == expected}
    own = tuple(rank for rank in part.ranks if rank not in same)
    if own and not part.box.is_whole:
        raise CheckpointSaveError(
            f"{name}: ranks {first} and {own[0]} hold the same part of it with other content. "
            "Replicas of a sharded tensor have to be equal: what makes them differ makes the run "
            "another one"
        )
    return own


def assign(holders: Holders, apart: Mapping[int, tuple[int, ...]]) -> list[Task]:
    """A task for every rank.

    A part that several ranks hold is written by the one that has the fewest bytes to write so far,
    if they hold the same. Otherwise each of those that differ from the first keeps its own:
    buffers that every rank has from its own data, random states. O(ranks x parts).

    Args:
        apart: by number, the parts that ranks have, or had, otherwise, and which of them do now.
    """
    loads = [*holders.alone_bytes]
    todo = [bytearray(WRITES.encode() * len(layout.names)) for layout in holders.layouts]
    groups: list[list[int]] = [[] for _ in holders.layouts]
    sets: dict[tuple[int, ...], int] = {}
    for number, (name, part) in enumerate(holders.parts):
        own = apart.get(number, ())
        same = [r for r in part.ranks if r not in own] if own else part.ranks
        writer = min(same, key=loads.__getitem__)
        loads[writer] += size_bytes(part.box)
        for letter, ranks in ((_SKIPS, same), (_OWNS, own)):
            for rank in ranks:
                if rank != writer:
                    todo[rank][holders.number(rank, name)] = ord(letter)
        group = APART if number in apart else sets.setdefault(part.ranks, len(sets))
        for rank in part.compared:
            groups[rank].append(group)
    return [
        Task(letters.decode(), tuple(found)) for letters, found in zip(todo, groups, strict=True)
    ]
