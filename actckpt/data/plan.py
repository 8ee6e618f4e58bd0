"""What a policy decided: which calls or operations to recompute, and what is saved inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from actckpt.data.brief import brief
from actckpt.errors import PlanError

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class SavedOp:
    """An operation whose outputs stay resident: the ``nth`` call of ``name`` in a stage."""

    path: str
    call: int
    name: str
    nth: int


@dataclass(frozen=True, slots=True)
class Region:
    """A span of the forward pass that is recomputed together.

    Args:
        first: (module path, call number) of the first stage.
        last: the last stage: a later sibling of ``first`` under the same parent call, or equal.
        regions: regions inside this one, in forward order, disjoint.
        saved: operations of this region whose outputs are kept rather than recomputed.
    """

    first: Key
    last: Key
    regions: tuple[Region, ...] = ()
    saved: tuple[SavedOp, ...] = ()

    def walk(self) -> Iterator[Region]:
        """This region and every region inside it, outermost first."""
        yield self
        for child in self.regions:
            yield from child.walk()

    @property
    def label(self) -> str:
        """Short name for tables and messages, such as ``h.0`` or ``h.0 … h.3``."""
        first, last = (
            path + (f"#{call}" if call else "") for path, call in (self.first, self.last)
        )
        return first if self.first == self.last else f"{first} … {last}"


@dataclass(frozen=True, slots=True)
class Burst:
    """Operations that run again, one after the other, when backward first needs a result of theirs.

    Args:
        ops: indices in ``Graph.ops``, ascending.
        drops: indices in ``Graph.saves`` of what autograd would save and this burst makes again.
        inner: bursts that need results of this one, which runs before the first of them.
    """

    ops: tuple[int, ...]
    drops: tuple[int, ...]
    inner: tuple[Burst, ...] = ()

    def walk(self) -> Iterator[Burst]:
        """This burst and every burst inside it, outermost first."""
        yield self
        for child in self.inner:
            yield from child.walk()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is recomputed; everything else is saved as without a plan.

    Either by calls (``regions``, in forward order, disjoint), which any batch of any shape can be
    run under, or by operations (``bursts``), which belong to the very trace they were made for.
    """

    policy: str
    regions: tuple[Region, ...] = ()
    notes: tuple[str, ...] = field(default=())
    bursts: tuple[Burst, ...] = ()

    __repr__ = brief

    def walk(self) -> Iterator[Region]:
        """Every region at every depth, outermost first."""
        for region in self.regions:
            yield from region.walk()

    def walk_bursts(self) -> Iterator[Burst]:
        """Every burst at every depth, outermost first."""
        for burst in self.bursts:
            yield from burst.walk()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `Plan.from_json` reads it back equal."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: dict[str, Any] | str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            PlanError: the data has other fields than a plan.
        """
        data: dict[str, Any] = json.loads(text) if isinstance(text, str) else text
        try:
            return cls(
                data["policy"],
                tuple(_region_from_json(r) for r in data["regions"]),
                tuple(data["notes"]),
                tuple(_burst_from_json(b) for b in data.get("bursts", ())),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise PlanError(f"not a plan: {error}") from error


def _region_from_json(data: dict[str, Any]) -> Region:
    return Region(
        (data["first"][0], data["first"][1]),
        (data["last"][0], data["last"][1]),
        tuple(_region_from_json(r) for r in data["regions"]),
        tuple(SavedOp(**s) for s in data["saved"]),
    )


def _burst_from_json(data: dict[str, Any]) -> Burst:
    inner = tuple(_burst_from_json(b) for b in data["inner"])
    return Burst(tuple(data["ops"]), tuple(data["drops"]), inner)
