"""Forwards whose graphs are alive at once: bi-encoders, siamese losses, a state carried along.

Each forward is planned by itself, with what the others hold in mind: those before it hold what they
saved while its own backward runs, and those after it need memory while it holds what it saved.
Which come after is known from the last time that a forward like the first of them began.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from actckpt.batch_key import BatchKey
from actckpt.graph import Category
from actckpt.planning import Planned
from actckpt.profiler.census import sizes
from actckpt.room import held_untouched_bytes
from actckpt.tracing.call import tensors

# outputs whose nodes are watched
_OUTPUTS = 16
# that a session remembers
_COMPANIES = 8


class Owner(Protocol):
    """What a session is to companies."""

    led: list[Company]

    def resident_bytes_beside(self, other: Any) -> int: ...


class Pending:
    """The graph of a forward until backward reaches it; autograd's nodes keep it."""

    __slots__ = ("__weakref__", "begun")

    def __init__(self) -> None:
        self.begun = False

    def __call__(self, gradients: Any) -> None:
        self.begun = True


@dataclass(eq=False, slots=True)
class Member:
    """One forward of a company.

    Attributes:
        batch: the storages of its arguments, by address, and their bytes.
        fresh_bytes: of those that no forward before it has, too.
        planned: the plan that it last ran under; ``least``: one of those that hold the least.
    """

    owner: weakref.ref[Owner]
    key: BatchKey
    batch: dict[int, int] = field(default_factory=dict)
    fresh_bytes: int = 0
    planned: Planned | None = None
    least: Planned | None = None
    pending: weakref.ref[Pending] | None = None

    def is_alive(self) -> bool:
        """Whether its graph exists and backward has not come to it."""
        found = self.pending() if self.pending is not None else None
        return found is not None and not found.begun

    def is_like(self, other: Member) -> bool:
        """Whether two forwards are of one model on such a batch."""
        return self.owner() is other.owner() and self.key == other.key


ACTIVATION = str(Category.ACTIVATION)


def held_bytes(planned: Planned | None) -> int:
    """Activations that a forward holds under its plan when it has ended."""
    return planned.dry.held.get(ACTIVATION, 0) if planned is not None else 0


def _untouched_bytes(member: Member) -> int:
    """Those that it would hold if nothing were recomputed."""
    return held_untouched_bytes(member.planned.graph) if member.planned is not None else 0


def _passing_bytes(member: Member) -> int:
    """What its backward takes beyond that."""
    if member.planned is None:
        return 0
    return max(0, member.planned.untouched.added_bytes - _untouched_bytes(member))


@dataclass(eq=False, slots=True)
class Company:
    """Forwards in the order in which they began, the graph of each alive when the next began.

    ``expected`` are those of earlier steps that began alike.
    """

    members: list[Member] = field(default_factory=list)
    expected: list[Company] = field(default_factory=list)

    def place(self, member: Member) -> Place:
        """Takes a forward in; returns what is known of the others."""
        index = len(self.members)
        known = {address for m in self.members for address in m.batch}
        member.fresh_bytes = sum(b for a, b in member.batch.items() if a not in known)
        self.members.append(member)
        owner = self.members[0].owner()
        if not index and owner is not None:
            self.expected = list(owner.led)
        self.expected = [
            c for c in self.expected if index < len(c.members) and c.members[index].is_like(member)
        ]
        if index and not self.expected and owner is not None:
            # more than was expected, or others
            owner.led = [c for c in owner.led[-_COMPANIES:] if not c.begins(self)]
            owner.led.append(self)
        later = [c.members[index + 1 :] for c in self.expected if c is not self]
        return Place(
            member,
            self.members[:index],
            max(later, key=_demand, default=[]),
            [c.members[index] for c in self.expected],
        )

    def begins(self, other: Company) -> bool:
        """Whether another company is this one, or this one and more."""
        return len(self.members) <= len(other.members) and all(
            a.is_like(b) for a, b in zip(self.members, other.members, strict=False)
        )


def _demand(later: list[Member]) -> int:
    return sum(map(_untouched_bytes, later)) + (_passing_bytes(later[-1]) if later else 0)


@dataclass(frozen=True, slots=True)
class Place:
    """One forward between those that are alive and those that are expected.

    ``known`` are what it was in earlier companies.
    """

    member: Member
    before: list[Member]
    later: list[Member]
    known: list[Member]

    @property
    def alone(self) -> bool:
        """Whether no other graph is alive beside it."""
        return not self.before and not self.later

    @property
    def size(self) -> int:
        """How many forwards are alive at once."""
        return len(self.before) + 1 + len(self.later)

    def runs_under(self, planned: Planned, least: bool) -> None:
        """Its plan is decided.

        Args:
            least: there is none that holds less.
        """
        for m in (self.member, *self.known):
            m.planned = planned
            if least:
                m.least = planned

    def others(self) -> list[Owner]:
        """The others that take part."""
        mine = self.member.owner()
        found = {id(o): o for m in (*self.before, *self.later) if (o := m.owner()) is not None}
        return [o for o in found.values() if o is not mine]

    def beside_bytes(self) -> int:
        """What the others hold while it runs, other models' weights included."""
        mine = self.member.owner()
        held = sum(held_bytes(m.planned) for m in self.before)
        # batches, without what is in its own
        held += sum(m.fresh_bytes for m in (*self.before, *self.later))
        held -= sum(self.member.batch.values()) - self.member.fresh_bytes
        return held + sum(o.resident_bytes_beside(mine) for o in self.others())

    def followed_by_own(self) -> bool:
        """Whether gradients of its model are there when its backward begins."""
        mine = self.member.owner()
        return any(m.owner() is mine for m in self.later)

    def share_bytes(self, rest_bytes: int, own: Planned) -> int:
        """How much it may hold when it has ended, of what all that are left can have.

        In proportion to what each would hold untouched, but not less than it can hold, and at most
        what leaves the later ones the least that they need.
        """
        wanted = held_untouched_bytes(own.graph)
        of_all = wanted + sum(map(_untouched_bytes, self.later))
        passing = _passing_bytes(self.later[-1])
        share = int(max(0, rest_bytes - passing) * wanted / max(1, of_all))
        share = max([share, *(held_bytes(m.least) for m in self.known)])
        return min(share, rest_bytes - self.needed_later_bytes())

    def needed_later_bytes(self) -> int:
        """The least that the later ones need, as far as it is known."""
        last = self.later[-1].least
        between = sum(held_bytes(m.least) for m in self.later[:-1])
        return between + last.dry.added_bytes if last is not None else 0

    def is_final(self) -> bool:
        """Whether nothing can be had of the others where no plan for this one fits."""
        if self.later:
            return self.needed_later_bytes() > 0
        return all(m.least is m.planned for m in self.before)


class _Now(threading.local):
    company: Company | None = None


_NOW = _Now()


def join(owner: Owner, key: BatchKey, arguments: Any) -> Place:
    """A forward begins: its place among those whose graphs are alive in this thread."""
    company = _NOW.company
    member = Member(weakref.ref(owner), key, sizes(tensors(arguments)))
    if company is not None:
        alive = [m for m in company.members if m.is_alive()]
        if not alive:
            company = None
        elif len(alive) < len(company.members):
            company = Company()
            for m in alive:
                company.place(m)
    if company is None:
        company = Company()
    _NOW.company = company
    return company.place(member)


def follow(member: Member, output: Any) -> None:
    """The forward has returned: its graph is watched until backward reaches it."""
    pending = None
    for _, t in zip(range(_OUTPUTS), _nodes(output), strict=False):
        if pending is None:
            pending = Pending()
            member.pending = weakref.ref(pending)
        t.register_prehook(pending)


def _nodes(output: Any) -> Iterator[Any]:
    if isinstance(output, torch.Tensor):
        if output.grad_fn is not None:
            yield output.grad_fn
        return
    seen = set()
    for t in tensors(output):
        node = t.grad_fn
        if node is not None and node not in seen:
            seen.add(node)
            yield node
