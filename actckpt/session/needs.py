"""What a plan must leave to other forwards whose graphs are alive at the same time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from actckpt.data.budget_error import BudgetError
from actckpt.planning.margin import aims
from actckpt.planning.request import Planned, Request
from actckpt.planning.room import Room
from actckpt.profiler import census
from actckpt.session.company import ACTIVATION, Place, held_bytes
from actckpt.units import ByteUnit, format_bytes

# of a share, what is taken for it: it is computed from what others were last planned for
_ABOUT = 1.02


class Needs(NamedTuple):
    """What a plan for a forward has to do with.

    Attributes:
        resident: gradients are there when its backward begins.
        beside_bytes: what others hold meanwhile.
        rest_bytes: what is left of the budget beside that and residents.
        share_bytes: how much it may hold when it has ended; None where none comes after it.
    """

    resident: bool
    beside_bytes: int = 0
    rest_bytes: int = 0
    share_bytes: int | None = None

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return not self.beside_bytes and self.share_bytes is None

    def may_hold(self, planned: Planned) -> bool:
        """Whether what a plan holds is its share, more or less: later ones get what is left."""
        return self.share_bytes is None or held_bytes(planned) <= _ABOUT * self.share_bytes

    def at_most(self, share_bytes: int) -> Needs:
        """The same where it may hold so much."""
        return self._replace(share_bytes=share_bytes)

    def room(self, place: Place) -> Room:
        """What a plan must leave; one plan for all forwards of a kind that come before the last."""
        if self.share_bytes is None:
            return Room(self.beside_bytes)
        alike = sum(m.is_like(place.member) for m in place.later[:-1])
        share = max(0, self.share_bytes)
        ahead = max(0, self.rest_bytes - (alike + 1) * share)
        return Room(self.beside_bytes + alike * share, ahead)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a request bounds: how many bytes a plan may take, and an untouched step; of what."""

    planned_bytes: float
    untouched_bytes: float
    scope: str

    @classmethod
    def of(cls, model: nn.Module, request: Request) -> Bounds:
        """Those of a request for a model."""
        budget = math.inf if request.budget_bytes is None else request.budget_bytes
        aim, untouched = aims(model)
        return cls(budget * aim, budget * untouched, request.scope)

    def needs(self, place: Place, resident: bool, own: Planned | None) -> Needs:
        """What a plan must leave to the forwards whose graphs are alive beside its own.

        Args:
            resident: gradients are there already.
            own: a plan that was made for such a forward.
        """
        if self.planned_bytes == math.inf:
            return Needs(resident)
        beside = place.beside_bytes()
        if not place.later or own is None:
            return Needs(resident, beside)
        rest = int(self.planned_bytes) - beside
        if self.scope == "step":
            rest -= lasting_bytes(own)
        resident = resident or place.followed_by_own()
        return Needs(resident, beside, rest, place.share_bytes(rest, own))

    def leaves(self, planned: Planned, needs: Needs) -> bool:
        """Whether a plan leaves what it must."""
        plan = planned.plan
        most = self.planned_bytes if plan.regions or plan.bursts else self.untouched_bytes
        peak = Room(needs.beside_bytes).peak_bytes(planned.dry, self.scope)
        return peak <= most and needs.may_hold(planned)


def lasting_bytes(planned: Planned) -> int:
    """Everything but activations that is there during a backward, gradients included."""
    held = sum(size for name, size in planned.dry.held.items() if name != ACTIVATION)
    if planned.graph.resident_gradients:
        return held
    return held + sum(s.bytes for s in planned.graph.storages if s.settled >= 0)


def resident_bytes_beside(model: nn.Module, optimizers: Iterable[Any], other: nn.Module) -> int:
    """What a model and its optimizers keep on the device of another, without what both have."""
    parameters = list(model.parameters())
    device = next((p.device for p in other.parameters()), torch.device("cpu"))
    shared = census.sizes((*other.parameters(), *other.buffers()))
    state = [getattr(o, "state", {}) for o in optimizers]
    there = census.tensors([parameters, list(model.buffers()), state])
    held = census.sizes(t for t in there if t.device == device)
    gradients = sum(p.nbytes for p in parameters if p.requires_grad and p.device == device)
    return sum(size for address, size in held.items() if address not in shared) + gradients


def note_of(room: Room) -> str:
    """What a report says of a plan that leaves room to others."""
    return (
        "graphs of several forwards are alive, or other optimized models are there: planned for "
        f"{format_bytes(room.beside_bytes)} that others hold beside this one, and "
        f"{format_bytes(room.ahead_bytes)} that later ones need; the figures are this one's"
    )


def together(error: BudgetError, place: Place, unit: ByteUnit) -> BudgetError:
    """The error for a forward of several, or beside other optimized models."""
    beside = unit.text(place.beside_bytes())
    if place.alone:
        more = f"Other optimized models hold {beside} meanwhile."
    else:
        more = (
            f"It is one of {place.size} forwards whose graphs are alive at once; the others hold "
            f"{beside} meanwhile."
        )
    found = BudgetError(
        f"{error}\n{more}",
        budget_bytes=error.budget_bytes,
        smallest_bytes=error.smallest_bytes,
        smallest_plan=error.smallest_plan,
        excluded_bytes=error.excluded_bytes,
        split=error.split,
    )
    return found


def warning_of(error: BudgetError, place: Place, needs: Needs, unit: ByteUnit) -> str:
    """What is said before the last forward of several whose others were planned alone."""
    return (
        f"graphs of {place.size} forwards are alive at once, and those before this one hold "
        f"{unit.text(needs.beside_bytes)}: the smallest plan of this one then needs "
        f"{unit.text(error.smallest_bytes or 0)}, above the budget of "
        f"{unit.text(error.budget_bytes or 0)}. This step may go over it; from the next "
        "one on they are planned together, as far as they fit"
    )
