"""When the storages of a step lived, and which operation made each."""

from __future__ import annotations

from dataclasses import dataclass

from actckpt.data.graph import Category


@dataclass(slots=True)
class Life:
    """One storage of a step, in the order of birth.

    Attributes:
        born: number of the executed operation that made it; it was there when that had run.
        died: number of the first executed operation after which it was gone; -1 while it lives.
        bytes: as allocated.
        category: the last that it had (a gradient that has arrived is no activation any more).
        since: number of the executed operation from which on it had that category.
        op: index in `Graph.ops` of the operation that made it; -1 where that is not known.
        name: of that operation; "" for what was there before the step.
        region: label of the region whose recomputation made it, "" for anything else.
        again: made by a recomputation.
    """

    born: int
    died: int
    bytes: int
    category: Category
    since: int
    op: int = -1
    name: str = ""
    region: str = ""
    again: bool = False

    def is_at(self, instant: int) -> bool:
        """Whether it lived when operation ``instant`` had run."""
        return self.born <= instant and (self.died < 0 or instant < self.died)

    def category_at(self, instant: int) -> Category:
        """What it was then: everything that a step makes begins as an activation."""
        return self.category if instant >= self.since else Category.ACTIVATION


class Lives:
    """Keeps the lives of a `LiveMeter`'s storages. ``now`` is the operation that is running."""

    def __init__(self) -> None:
        self.now = 0
        self.found: list[Life] = []

    def born(self, storage: int, category: Category) -> None:
        """Storage number ``storage`` is seen for the first time; they are numbered in order."""
        assert storage == len(self.found)
        self.found.append(Life(self.now, -1, 0, category, self.now))

    def resized(self, storage: int, size_bytes: int) -> None:
        """It takes so many bytes from now on."""
        self.found[storage].bytes = size_bytes

    def moved(self, storage: int, category: Category) -> None:
        """It belongs to another category from now on."""
        life = self.found[storage]
        if life.category is not category:
            life.category, life.since = category, self.now

    def died(self, storage: int) -> None:
        """Its memory is free again."""
        self.found[storage].died = self.now
