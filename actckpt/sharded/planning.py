"""Who writes what, said once: ranks say what is new since the save before, and so does the answer.

A rank says digests of its layout, of the task that it has, and of what other ranks can hold too.
What the coordinator does not know, it asks for; what the rank does not know, it is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import xxhash

from actckpt.checkpoint.encoding import Encoded
from actckpt.errors import CheckpointSaveError
from actckpt.sharded.assignment import Assignment, Task, assign, owners
from actckpt.sharded.contents import Contents, Grouped, contents_of
from actckpt.sharded.expected import Table, tables
from actckpt.sharded.holders import Holders
from actckpt.sharded.layout import Layout, digest_of_tree, layout_of

# what is said of a layout in full, and of contents one by one
NAMES, BOXES, EACH = "names", "boxes", "each"
_Key = tuple[str, str]


class Holding:
    """What one rank says of what it holds, and what it has been told to do with it.

    Attributes:
        told: how often all of its layout was said.
    """

    def __init__(self) -> None:
        self.told = 0
        # what the coordinator is known to know
        self._known: _Key | None = None
        self._task: Task | None = None
        self._key: _Key = ("", "")
        self._layout: Layout | None = None
        self._contents = Contents(b"")
        self._texts: dict[str, str] = {}

    def forget(self) -> None:
        """What the coordinator knows is not known any more: the next save says everything."""
        self._known, self._task = None, None

    def say(self, items: Mapping[str, Encoded], world_size: int) -> dict[str, Any]:
        """What this rank holds now, as a message; where it is new, `in_full` goes with it."""
        layout = self._layout = layout_of(items, world_size)
        self._texts = {
            NAMES: json.dumps(layout.names),
            BOXES: json.dumps(layout.boxes_to_json()),
        }
        self._key = _digest(self._texts[NAMES]), _digest(self._texts[BOXES])
        if self._key != self._known:
            self.forget()
        self._contents = contents_of(items, layout)
        task = self._task
        return {
            "trees": {item: digest_of_tree(e.tree) for item, e in items.items()},
            "layout": self._key,
            "full": self._known is None,
            "task": "" if task is None else task.digest(self._key),
            "contents": self._contents.each()
            if task is None
            else self._contents.grouped(task.groups).to_json(),
        }

    @property
    def is_new(self) -> bool:
        """Whether what `say` said needs `in_full` beside it."""
        return self._known is None

    def in_full(self) -> dict[str, str]:
        """The layout, as two messages."""
        self.told += 1
        return self._texts

    def answer(self, asked: Sequence[str]) -> dict[str, str]:
        """What the coordinator asks for."""
        found = self.in_full() if NAMES in asked else {}
        return {**found, EACH: self._contents.each()}

    def take(self, told: Mapping[str, Any]) -> tuple[Assignment, str]:
        """What this rank is to do, and the digest of that.

        Raises:
            CheckpointSaveError: it is told to do as before, and did not do that before.
        """
        assert self._layout is not None
        task = Task.from_json(told) if "todo" in told else self._task
        digest = "" if task is None else task.digest(self._key)
        if task is None or digest != told["task"]:
            self.forget()
            raise CheckpointSaveError(
                f"is to do as rank 0 planned ({told['task']:.8}), and has {digest or 'no'} plan "
                "of it. The next save tells everything anew"
            )
        self._known, self._task = self._key, task
        return task.assignment(self._layout, told["trees"], told["without"]), digest


# of one rank, a text that it said in full
Fetch = Callable[[int, str], str]
# by rank, what to answer
Ask = Callable[[dict[int, list[str]]], Mapping[int, Mapping[str, str]]]


class Planner:
    """What the coordinator knows of all ranks, save after save.

    Attributes:
        planned: how often it was thought through who writes what.
    """

    def __init__(self) -> None:
        self.planned = 0
        self._names: dict[str, tuple[str, ...]] = {}
        self._layouts: dict[_Key, Layout] = {}
        self._keys: list[_Key] = []
        self._holders: Holders | None = None
        # by number of a part that ranks had otherwise since, those that do now
        self._apart: dict[int, tuple[int, ...]] = {}
        self._tasks: list[Task] = []
        self._digests: list[str] = []
        self._tables: list[Table] | None = None

    def plan(self, said: Sequence[Mapping[str, Any]], fetch: Fetch, ask: Ask) -> list[str]:
        """For every rank the digest of its task, `reply` has the rest.

        Args:
            said: by rank, what `Holding.say` says.

        Raises:
            CheckpointSaveError: the ranks do not hold one and the same tensors.
        """
        keys: list[_Key] = [(s["layout"][0], s["layout"][1]) for s in said]
        each = {
            rank: Contents.from_each(s["contents"])
            for rank, s in enumerate(said)
            if isinstance(s["contents"], str)
        }
        grouped = {
            rank: Grouped.from_json(s["contents"])
            for rank, s in enumerate(said)
            if not isinstance(s["contents"], str)
        }
        self._learn(keys, said, fetch, ask, each)
        same = keys == self._keys and self._holders is not None
        holders = self._holders if same else None
        holders = holders or Holders([self._layouts[key] for key in keys])
        apart: dict[int, tuple[int, ...]] | None = None
        if same:
            # one that was told otherwise, or by another, groups otherwise
            strange = [r for r in grouped if said[r]["task"] != self._digests[r]]
            self._ask_each(strange, ask, each)
            apart = self._still_apart(
                holders,
                [
                    each[r].grouped(self._tasks[r].groups) if r in each else grouped[r]
                    for r in range(len(said))
                ],
            )
        if apart is None:
            self._ask_each([r for r in range(len(said)) if r not in each], ask, each)
            apart = _apart(holders, each, self._apart if same else {})
        if not same or apart != self._apart:
            self.planned += 1
            self._tasks = assign(holders, apart)
            self._tables = None
            self._digests = [t.digest(k) for t, k in zip(self._tasks, keys, strict=True)]
        self._keys, self._holders, self._apart = keys, holders, apart
        self._layouts = {key: self._layouts[key] for key in keys}
        self._names = {key[0]: self._layouts[key].names for key in keys}
        return [*self._digests]

    @property
    def expected(self) -> list[Table]:
        """By rank, what its manifest lists if it does as it was told."""
        assert self._holders is not None
        if self._tables is None:
            self._tables = tables(self._holders.layouts, self._tasks)
        return self._tables

    def reply(self, rank: int, said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a rank is told, as `Holding.take` reads it."""
        trees, first = said[rank]["trees"], said[0]["trees"]
        told = {
            "task": self._digests[rank],
            "trees": [item for item, d in trees.items() if rank and d != first.get(item)],
            "without": [item for item in first if item not in trees],
        }
        if said[rank]["task"] != told["task"]:
            told |= self._tasks[rank].to_json()
        return told

    def _learn(
        self,
        keys: Sequence[_Key],
        said: Sequence[Mapping[str, Any]],
        fetch: Fetch,
        ask: Ask,
        each: dict[int, Contents],
    ) -> None:
        """Takes in layouts that are new here, of ranks that said them or are asked to."""
        by = {key: rank for rank, key in enumerate(keys) if said[rank]["full"]}
        unknown = {rank: [NAMES, BOXES, EACH] for rank, key in enumerate(keys)
                   if key not in self._layouts and key not in by}  # fmt: skip
        answers = ask(unknown) if unknown else {}
        each |= {rank: Contents.from_each(a[EACH]) for rank, a in answers.items()}
        for rank, key in enumerate(keys):
            if key in self._layouts:
                continue
            source = by.get(key, rank)
            texts: Callable[[str], str] = (
                answers[rank].__getitem__ if rank in answers else partial(fetch, source)
            )
            if key[0] not in self._names:
                self._names[key[0]] = tuple(json.loads(_checked(texts(NAMES), key[0], rank)))
            boxes = json.loads(_checked(texts(BOXES), key[1], rank))
            self._layouts[key] = Layout.from_json(self._names[key[0]], boxes)

    def _ask_each(self, ranks: Sequence[int], ask: Ask, each: dict[int, Contents]) -> None:
        if ranks:
            answers = ask({rank: [EACH] for rank in ranks})
            each |= {rank: Contents.from_each(a[EACH]) for rank, a in answers.items()}

    def _still_apart(
        self, holders: Holders, grouped: Sequence[Grouped]
    ) -> dict[int, tuple[int, ...]] | None:
        """Who has what otherwise, if that is only what was apart before; None if it is more."""
        expected: dict[int, str] = {}
        for found in grouped:
            for group, digest in found.together.items():
                if expected.setdefault(group, digest) != digest:
                    return None
        numbers: list[dict[int, int]] = [{} for _ in grouped]
        for number in sorted(self._apart):
            for rank in holders.parts[number][1].compared:
                numbers[rank][number] = len(numbers[rank])

        def told(number: int, rank: int) -> str:
            return grouped[rank].apart[numbers[rank][number]]

        return {n: owners(holders, n, partial(told, n)) for n in self._apart}


def _apart(
    holders: Holders, each: Mapping[int, Contents], before: Mapping[int, tuple[int, ...]]
) -> dict[int, tuple[int, ...]]:
    """Who has what otherwise; what was apart before stays so."""
    numbers: dict[tuple[int, bytes], dict[str, int]] = {}
    by_rank = []
    for rank, layout in enumerate(holders.layouts):
        told = bytes(box.compared for box in layout.boxes)
        key = id(layout.names), bytes(told[which] for which in layout.which)
        if key not in numbers:
            numbers[key] = holders.compared(rank)
        by_rank.append(numbers[key])

    def digest(name: str, rank: int) -> bytes:
        return each[rank].digest(by_rank[rank][name])

    found = {}
    for number, (name, _) in enumerate(holders.parts):
        own = owners(holders, number, partial(digest, name))
        if own or number in before:
            found[number] = own
    return found


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _checked(text: str, digest: str, rank: int) -> str:
    if _digest(text) != digest:
        raise CheckpointSaveError(f"rank {rank} said that it holds something else than it says")
    return text
