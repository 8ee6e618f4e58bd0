"""Forwards whose graphs are alive at once: bi-encoders, siamese losses, a state carried along.

Each forward is planned by itself, with what the others hold in mind: those before it hold what they
saved while its own backward runs, and those after it need memory while it holds what it saved.
Which come after is known from the last time that a forward like the first of them began. A graph
that a backward keeps (``create_graph``: gradient penalties, inner steps) stays alive, and holds
what the gradients are computed from besides.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from actckpt.data.graph import Category
from actckpt.planning.request import Planned
from actckpt.planning.room import held_untouched_bytes
from actckpt.profiler.census import sizes
from actckpt.session.backward_watch import BackwardWatch, Seen
from actckpt.session.batch_key import BatchKey
from actckpt.tracing.backwards import Backward

# that a session remembers
_COMPANIES = 8


class Owner(Protocol):
    """What a session is to companies."""

    led: list[Company]
    met: weakref.WeakSet[Any]

    def resident_bytes_beside(self, other: Any) -> int: ...


@dataclass(eq=False, slots=True)
class Member:
    """One forward of a company.

    Attributes:
        batch: the storages of its arguments, by address, and their bytes.
        weights: those of the tensors that stand in for parameters and were computed.
        fresh_bytes: of its arguments that no forward before it has, too.
        fresh_weights_bytes: the same of the weights.
        seen: the backwards that run over its graph.
        planned: the plan that it last ran under; ``least``: one of those that hold the least.
        backwards: what that was made for.
        graph: what lives as long as the graph that it has made.
    """

    owner: weakref.ref[Owner]
    key: BatchKey
    batch: dict[int, int] = field(default_factory=dict)
    weights: dict[int, int] = field(default_factory=dict)
    fresh_bytes: int = 0
    fresh_weights_bytes: int = 0
    seen: Seen = field(default_factory=Seen)
    planned: Planned | None = None
    least: Planned | None = None
    backwards: tuple[Backward, ...] = ()
    graph: weakref.ref[BackwardWatch] | None = None

    def is_alive(self) -> bool:
        """Whether its graph exists and no backward has come to it that ends it."""
        found = self.graph() if self.graph is not None else None
        return found is not None and not found.done

    def is_foreseen(self) -> bool:
        """Whether its plan was made for the backwards that run over its graph."""
        return self.backwards == self.seen.found

    def smallest(self) -> Planned | None:
        """A plan that holds the least, if one is known."""
        return self.least if self.is_foreseen() else None

    def is_like(self, other: Member) -> bool:
        """Whether two forwards are of one model on such a batch."""
        return self.owner() is other.owner() and self.key == other.key


ACTIVATION = str(Category.ACTIVATION)


def held_bytes(planned: Planned | None) -> int:
    """Activations that a forward holds under its plan when it has ended, or a backward keeps."""
    if planned is None:
        return 0
    return max(planned.dry.held.get(ACTIVATION, 0), planned.dry.kept.get(ACTIVATION, 0))


def untouched_bytes(planned: Planned | None) -> int:
    """Those that it would hold if nothing were recomputed.

    What gradients are computed from is the same under every plan, or less where that is recomputed.
    """
    if planned is None:
        return 0
    more = held_bytes(planned) - planned.dry.held.get(ACTIVATION, 0)
    return held_untouched_bytes(planned.graph) + more


def _untouched_bytes(member: Member) -> int:
    if member.planned is None or member.is_foreseen():
        return untouched_bytes(member.planned)
    return held_untouched_bytes(member.planned.graph)


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
        if not index:
            return self._begin(member)
        known = {address for m in self.members for address in (*m.batch, *m.weights)}
        member.fresh_bytes = sum(b for a, b in member.batch.items() if a not in known)
        member.fresh_weights_bytes = sum(b for a, b in member.weights.items() if a not in known)
        self.members.append(member)
        owner = self.members[0].owner()
        self._expect(self.expected)
        if not self.expected and owner is not None:
            # more than was expected, or others
            owner.led = [c for c in owner.led[-_COMPANIES:] if not c.begins(self)]
            owner.led.append(self)
        return self._place(index)

    def _begin(self, member: Member) -> Place:
        """The first, which most often stays alone."""
        self.members.append(member)
        member.fresh_bytes = sum(member.batch.values())
        member.fresh_weights_bytes = sum(member.weights.values())
        owner = member.owner()
        if owner is None or not owner.led:
            return Place(member, [], [], [])
        self._expect(owner.led)
        return self._place(0)

    def _expect(self, companies: list[Company]) -> None:
        """Those of some that are like this one so far."""
        index = len(self.members) - 1
        member = self.members[index]
        self.expected = [
            c for c in companies if index < len(c.members) and c.members[index].is_like(member)
        ]

    def _place(self, index: int) -> Place:
        member = self.members[index]
        later = [c.members[index + 1 :] for c in self.expected if c is not self]
        if self.expected:
            member.seen = self.expected[-1].members[index].seen
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


class Place(NamedTuple):
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

    def runs_under(self, planned: Planned, backwards: tuple[Backward, ...], least: bool) -> None:
        """Its plan is decided.

        Args:
            backwards: what it was made for.
            least: there is none that holds less.
        """
        for m in (self.member, *self.known):
            if m.backwards != backwards:
                m.least = None
            m.planned, m.backwards = planned, backwards
            if least:
                m.least = planned

    def backwards(self) -> tuple[Backward, ...] | None:
        """Those that were seen to run over its graph; None where nothing is known of it.

        Of one that was never seen beside those before it, nothing is expected.
        """
        return self.member.seen.found if self.known or self.before else None

    def others(self) -> list[Owner]:
        """The others that take part, or have taken part earlier: they are on the device."""
        mine = self.member.owner()
        found = {id(o): o for m in (*self.before, *self.later) if (o := m.owner()) is not None}
        if mine is not None:
            found.update((id(o), o) for o in mine.met)
        return [o for o in found.values() if o is not mine]

    def beside_bytes(self) -> int:
        """What the others hold while it runs, other models' weights included."""
        mine = self.member.owner()
        held = sum(held_bytes(m.planned) for m in self.before)
        # batches, without what is in its own
        held += sum(m.fresh_bytes for m in (*self.before, *self.later))
        held -= sum(self.member.batch.values()) - self.member.fresh_bytes
        held += sum(m.fresh_weights_bytes for m in (*self.before, self.member, *self.later))
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
        wanted = untouched_bytes(own)
        of_all = wanted + sum(map(_untouched_bytes, self.later))
        passing = _passing_bytes(self.later[-1])
        share = int(max(0, rest_bytes - passing) * wanted / max(1, of_all))
        share = max([share, *(held_bytes(m.smallest()) for m in self.known)])
        return min(share, rest_bytes - self.needed_later_bytes())

    def needed_later_bytes(self) -> int:
        """The least that the later ones need, as far as it is known."""
        last = self.later[-1].smallest()
        between = sum(held_bytes(m.smallest()) for m in self.later[:-1])
        return between + last.dry.added_bytes if last is not None else 0

    def is_final(self) -> bool:
        """Whether nothing can be had of the others where no plan for this one fits."""
        if self.later:
            return self.needed_later_bytes() > 0
        return all(m.least is m.planned for m in self.before)


class _Now(threading.local):
    company: Company | None = None


_NOW = _Now()


def join(
    owner: Owner, key: BatchKey, batch: list[torch.Tensor], weights: list[torch.Tensor]
) -> Place:
    """A forward begins: its place among those whose graphs are alive in this thread.

    Args:
        weights: what stands in for parameters and was computed.
    """
    company = _NOW.company
    member = Member(weakref.ref(owner), key, sizes(batch), sizes(weights))
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
