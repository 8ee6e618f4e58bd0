"""A plan that was made for one batch, and whether it serves the forward that begins."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import NamedTuple

from actckpt.planning.announcing import announce
from actckpt.planning.plan_key import plan_key
from actckpt.planning.request import Planned, Recalled, Request
from actckpt.planning.room import NO_OTHERS, Room
from actckpt.reporting.assemble import with_bound
from actckpt.reporting.facts import Figures
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.report import Report
from actckpt.session.batch_key import BatchKey
from actckpt.session.optimizer_watch import OptimizerWatch
from actckpt.session.optimizers_seen import Accounted
from actckpt.tracing.backwards import Backward
from actckpt.tracing.step import Step

logger = logging.getLogger("actckpt")


class Wanted(NamedTuple):
    """What a plan must have been made for to serve a forward.

    Attributes:
        resident: gradients are there when its backward begins.
        changes: forwards change from step to step.
    """

    key: BatchKey
    resident: bool
    backwards: tuple[Backward, ...]
    optimizers: OptimizerWatch
    changes: bool


@dataclass(slots=True)
class PlannedBatch:
    """A plan that was made for one batch.

    Attributes:
        room: what it leaves to other forwards whose graphs are alive beside its own.
        smallest: it is too large, but none is smaller.
        states_backwards: the loss that was given runs backwards itself; it was planned with those.
        accumulate: it bounds steps that find gradients, too.
        step: what it was planned for, without the batch's memory and without optimizers; None
            where the batch cannot be kept so.
    """

    key: BatchKey
    accumulate: bool
    optimizers: Accounted
    backwards: tuple[Backward, ...]
    planned: Planned
    report: Report
    room: Room = NO_OTHERS
    smallest: bool = False
    states_backwards: bool = False
    step: Step | None = None
    _bounded: bool = False
    _kept: Recalled | None = None

    @property
    def by_calls(self) -> bool:
        """Whether it recomputes nothing operation by operation."""
        return not self.planned.plan.bursts

    def serves(self, wanted: Wanted) -> bool:
        """Whether it was made for that, others beside it left out of account."""
        same = self.key == wanted.key
        if self.planned.plan.bursts and (wanted.changes or not same):
            return False  # operations of these very shapes
        return (
            (same or self.key.covers(wanted.key))
            and (self.accumulate or not wanted.resident)
            and wanted.optimizers.covered(self.optimizers)
            and self.backwards == wanted.backwards
        )

    def covers(self, wanted: Wanted) -> bool:
        """Whether it was made for that batch or a larger one, and could be made for it again."""
        alone = not self.room and not self.smallest
        return self.step is not None and alone and self.key.covers(wanted.key)

    def lacks(self, wanted: Wanted) -> str:
        """Why it does not serve, for messages."""
        if wanted.changes:
            return "the forward changes from step to step: by calls from now on, if they fit"
        if not self.key.covers(wanted.key):
            differs = self.key.difference(wanted.key)
            return f"the batch or the model's state is not the one planned for: {differs}"
        if not self.by_calls and self.key != wanted.key:
            return (
                "the batch is smaller than the one that the plan recomputes by operations for: by "
                "calls for such batches, if they fit"
            )
        if wanted.resident and not self.accumulate:
            return "gradients are resident when the step begins (accumulate=True plans for that)"
        if self.backwards != wanted.backwards:
            return "several backwards run over one graph, or one that keeps it"
        if not wanted.optimizers.key() <= (self.optimizers.optimizers or frozenset()):
            return "an optimizer has become known, or when it steps, or what its step takes"
        return "the optimizer holds more than when the plan was made"

    def to_keep(self) -> Recalled:
        """The plan for another process; made once, for saving often."""
        if self._kept is None:
            planned = self.planned
            self._kept = Recalled(plan_key(planned.graph), planned.plan, planned.profile)
        return self._kept

    def learn_measured(self, measurement: Measurement, *, untouched: bool) -> None:
        """Writes what was measured into the report."""
        figures = Figures(measurement.peak_bytes, measurement.step_s, measurement.added_bytes)
        name = "baseline" if untouched else "planned"
        arm = dataclasses.replace(getattr(self.report, name), measured=figures)
        self.report = dataclasses.replace(self.report, **{name: arm})

    def full_report(self, request: Request) -> Report:
        """The report with the lower bound, which only its readers need."""
        if not self._bounded:
            self.report = with_bound(self.report, self.planned, request)
            self._bounded = True
        return self.report


def say_why(current: PlannedBatch, wanted: Wanted, *, alone: bool, first: bool) -> None:
    """Says why there is another plan: a warning where the batch given was never used.

    Args:
        alone: no graphs of other forwards are alive.
    """
    differs = current.key.difference(wanted.key)
    if first and differs:
        logger.warning(
            "actckpt: planning again: the first forward is not the one that batch= stood for: "
            "%s. The report is of the new plan; without batch= there is only that one",
            differs,
        )
    else:
        others = "graphs of other forwards are alive beside this one's"
        announce(f"planning again: {current.lacks(wanted) if alone else others}")
