"""A session among others: its forwards have graphs that are alive beside those of other forwards.

What takes part is planned with what it must leave to the others.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from actckpt.data.budget_error import BudgetError
from actckpt.planning.request import Planned, Request
from actckpt.planning.room import Room
from actckpt.session.backward_watch import BackwardWatch, Seen
from actckpt.session.batch_key import BatchKey
from actckpt.session.company import Company, Member, Place, join
from actckpt.session.needs import Bounds, Needs, resident_bytes_beside, together, warning_of
from actckpt.session.optimizer_watch import OptimizerWatch
from actckpt.session.planned_batch import PlannedBatch
from actckpt.units import ByteUnit

logger = logging.getLogger("actckpt")

T = TypeVar("T")


class Participant:
    """What one session is to the companies that its forwards join.

    Attributes:
        led: companies that began with a forward of its model.
        met: the others of companies that it was in: they are on the device, graph or none.
    """

    def __init__(
        self, model: weakref.ref[nn.Module], request: Request, optimizers: OptimizerWatch
    ) -> None:
        self._model = model
        self._request = request
        self._optimizers = optimizers
        self.led: list[Company] = []
        self.met: weakref.WeakSet[Any] = weakref.WeakSet()
        # the forward that runs
        self._member: Member | None = None
        self._beside: dict[tuple[int, int], int] = {}

    def begin(
        self,
        key: BatchKey,
        batch: list[torch.Tensor],
        weights: list[torch.Tensor],
        resident: bool,
        made: Sequence[PlannedBatch],
    ) -> tuple[Place, Needs]:
        """A forward begins: its place among others, and what its plan must leave to them.

        Args:
            batch: the tensors that it is given.
            weights: what stands in for parameters and was computed.
            made: the plans so far.
        """
        place = join(self, key, batch, weights)
        if not place.alone:
            self.met.update(place.others())
        elif not self.met:
            return place, Needs(resident)
        return place, self._bounds().needs(place, resident, _own(place, made))

    def leaves(self, entry: PlannedBatch, needs: Needs) -> bool:
        """Whether a plan leaves what it must to other forwards."""
        if needs.alone:
            return not entry.room
        if entry.smallest:
            return entry.room.beside_bytes <= needs.beside_bytes
        return self._bounds().leaves(entry.planned, needs)

    def runs_under(self, entry: PlannedBatch, place: Place) -> None:
        """The plan of the forward that begins is decided."""
        place.runs_under(entry.planned, entry.backwards, entry.smallest)
        self._member = place.member

    def seen(self) -> Seen:
        """Takes down the backwards over the graph of the forward that runs."""
        return Seen() if self._member is None else self._member.seen

    def end(self, graph: BackwardWatch | None) -> None:
        """The forward has returned: until a backward ends its graph, that counts."""
        if self._member is not None:
            self._member.graph = None if graph is None else weakref.ref(graph)
            self._member = None

    def resident_bytes_beside(self, other: Participant) -> int:
        """What of this model is on the device and is not the other's, too.

        0 where only activations are bounded.
        """
        model, others = self._model(), other._model()
        if model is None or others is None or other._request.scope != "step":
            return 0
        optimizers = self._optimizers.current()
        held = [o.optimizer for o in optimizers]
        known = (id(other), sum(len(getattr(o, "state", {})) for o in held))
        if known not in self._beside:
            self._beside[known] = resident_bytes_beside(model, held, others)
        return self._beside[known]

    def _bounds(self) -> Bounds:
        model = self._model()
        assert model is not None  # its forward begins
        return Bounds.of(model, self._request)


def _own(place: Place, made: Sequence[PlannedBatch]) -> Planned | None:
    """A plan that was made for such a batch, the latest."""
    found = (e.planned for e in reversed(made) if e.key.covers(place.member.key))
    return next(found, place.known[0].planned if place.known else None)


def made_among(
    make: Callable[[Room, BudgetError | None], T], place: Place, needs: Needs, unit: ByteUnit
) -> T:
    """A plan for a forward that begins, beside the others.

    Args:
        make: a plan that leaves some room, or the smallest that an error knows of.
        unit: in which errors are written.

    Raises:
        BudgetError: none fits, and nothing can be had of the others.
    """
    try:
        return make(needs.room(place), None)
    except BudgetError as error:
        if place.alone and not place.others():
            raise
        too_small = error
    if place.later and (least := place.needed_later_bytes()):
        # its share is less than it can hold: what later ones can do without
        needs = needs.at_most(needs.rest_bytes - least)
        try:
            return make(needs.room(place), None)
        except BudgetError as error:
            raise together(error, place, unit) from error
    if place.is_final():
        raise together(too_small, place, unit) from too_small
    if not place.later:
        logger.warning("actckpt: %s", warning_of(too_small, place, needs, unit))
    return make(needs.room(place), too_small)
