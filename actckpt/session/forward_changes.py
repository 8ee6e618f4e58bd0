"""Forwards that were not the one that was planned for: others, or larger; what to plan then."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from actckpt.data.budget_error import BudgetError
from actckpt.planning.request import Request
from actckpt.rewriting.rewrite import Rewrite
from actckpt.session.batch_key import BatchKey
from actckpt.session.planned_batch import PlannedBatch

logger = logging.getLogger("actckpt")

# times that a session plans again because a forward was larger
_MOST_GROWN = 8
# plans by operations that a forward may leave in their first step where by calls nothing fits
_MOST_LEFT_AT_ONCE = 1


class ForwardChanges:
    """What is learned from the forwards of one session's model.

    Attributes:
        seen: a forward was not the traced one: no plan by operations will do.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self.seen = False
        # the last rewrite that a forward left, and how many were left in their very first one
        self._left: Rewrite | None = None
        self._left_at_once = 0
        self._grown = 0

    def note_divergence(self, rewrite: Rewrite | None) -> None:
        """Looks whether forwards have left the plan in force."""
        # a policy of the user's own would plan the same again
        if rewrite is None or not rewrite.diverged or self._request.by_calls == self._request:
            return
        self.seen = True
        if rewrite is not self._left:
            # in its very first step: the trace was of another forward, and would be again
            self._left_at_once = self._left_at_once + 1 if rewrite.runs == 1 else 0
        self._left = rewrite

    def note_growth(self, rewrite: Rewrite | None, current: PlannedBatch | None) -> bool:
        """Whether the last forward was larger than the one that was planned for by calls."""
        if rewrite is None or current is None or current.planned.plan.bursts:
            return False
        planned = current.planned.dry.nodes
        if rewrite.nodes <= planned or self._request.budget_bytes is None:
            return False
        if self._grown == _MOST_GROWN:
            return False
        guards = current.planned.graph.supposed
        if guards:
            self._grown = _MOST_GROWN
            logger.warning(
                "actckpt: a forward ran more than the one that was planned for, and may have taken "
                "more memory than the budget: it asks at %s, and was planned as if no guard fires",
                guards[0],
            )
            return False
        self._grown += 1
        last = " for the last time" if self._grown == _MOST_GROWN else ""
        logger.warning(
            "actckpt: a forward ran more than the one that was planned for (%d nodes of autograd's "
            "graph, not %d): it may have taken more memory than the budget. Planning again%s",
            rewrite.nodes,
            planned,
            last,
        )
        return True

    def request_for(self, key: BatchKey, made: Iterable[PlannedBatch]) -> Request:
        """By calls, where forwards or shapes change from step to step.

        Args:
            made: the plans so far.
        """
        varies = any(e.planned.plan.bursts and e.key.shapes != key.shapes for e in made)
        return self._request.by_calls if self.seen or varies else self._request

    def leaves_again(self, error: BudgetError) -> bool:
        """Whether forwards leave plans by operations at once, where by calls there is this error.

        The error then says so.
        """
        if self._left_at_once <= _MOST_LEFT_AT_ONCE:
            return False
        assert self._left is not None
        error.add_note(
            "actckpt: this is by calls. By operations it would fit, but the forward leaves "
            f"such a plan in its first step, again and again: {self._left.diverged}"
        )
        return True
