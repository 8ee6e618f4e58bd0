"""The plans of one model: made for a step as it is known, with those that were made before."""

from __future__ import annotations

import dataclasses
import logging
import time
import weakref
from collections.abc import Sequence

from torch import nn

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph, Phase
from actckpt.errors import PlanError
from actckpt.planning.accumulation import resident_peak_bytes
from actckpt.planning.announcing import announce_plan
from actckpt.planning.making import make_plan, make_smallest
from actckpt.planning.margin import aims
from actckpt.planning.request import Planned, Recalled, Request, noted
from actckpt.planning.room import NO_OTHERS, Room
from actckpt.planning.several_backwards import notes_on
from actckpt.reporting.assemble import assemble_report
from actckpt.rewriting.current import CURRENT
from actckpt.rewriting.installing import install, uninstall
from actckpt.session.batch_key import BatchKey
from actckpt.session.forward_changes import ForwardChanges
from actckpt.session.needs import note_of
from actckpt.session.optimizer_watch import OptimizerWatch
from actckpt.session.optimizers_seen import Accounted
from actckpt.session.outline import outline
from actckpt.session.planned_batch import PlannedBatch
from actckpt.tracing.call import Call
from actckpt.tracing.draws import asks_for_draws
from actckpt.tracing.lightning import TRAINING_STEP, refuse_manual
from actckpt.tracing.step import Step

logger = logging.getLogger("actckpt")


class Planner:
    """Makes plans for one request.

    Attributes:
        entries: the plans that were made, in order.
        recalled: plans that another process made.
    """

    def __init__(
        self,
        model: weakref.ref[nn.Module],
        request: Request,
        optimizers: OptimizerWatch,
        changes: ForwardChanges,
    ) -> None:
        self._model = model
        self.request = request
        self.optimizers = optimizers
        self.changes = changes
        self.entries: list[PlannedBatch] = []
        self.recalled: tuple[Recalled, ...] = ()

    def make(
        self,
        key: BatchKey,
        step: Step,
        request: Request,
        room: Room = NO_OTHERS,
        too_small: BudgetError | None = None,
        *,
        graph: Graph | None = None,
        keeps: bool = True,
        strictly: bool = False,
    ) -> PlannedBatch:
        """A plan that leaves some room, or the smallest that an error knows of.

        Args:
            request: as was asked, or by calls.
            graph: the trace of the step, if there is one.
            keeps: an earlier plan for this batch may be the one.
            strictly: not in another way than ``request`` says.
        """
        model = self._model()
        assert model is not None  # its forward is about to run
        if CURRENT.run is not None:
            raise PlanError("cannot plan while a planned forward or backward is running")
        if step.entry == TRAINING_STEP:
            refuse_manual(model)
        before = uninstall(model)
        began_s = time.perf_counter()
        try:
            if too_small is None:
                step, planned = self._planned(
                    model, step, request, room, graph, self._alike(key) if keeps else (), strictly
                )
            else:
                planned = make_smallest(model, step, self.request, too_small)
        finally:
            if before is not None:
                install(before)
        announce_plan(planned, self.request, time.perf_counter() - began_s)
        if room:
            planned = noted(planned, note_of(room))
        name = type(model).__name__
        report = assemble_report(planned, self.request, notes_on(step), model=name)
        # as they are known now: the step that was planned has no others
        accounted = Accounted.of(self.optimizers.key(), planned.graph)
        self.optimizers.untraced(planned.graph, step.optimizers)
        entry = PlannedBatch(
            key,
            step.accumulate or (not room and self._fits_resident(model, planned, step)),
            accounted,
            step.backwards,
            planned,
            report,
            room,
            smallest=too_small is not None,
            states_backwards=any(op.nested and op.phase is Phase.LOSS for op in planned.graph.ops),
            step=_outlined(step),
        )
        self.entries.append(entry)
        return entry

    def _fits_resident(self, model: nn.Module, planned: Planned, step: Step) -> bool:
        """Whether the plan is one for steps that find gradients, too."""
        budget = self.request.budget_bytes
        if budget is None or self.request.scope != "step":
            return False
        peak = resident_peak_bytes(planned, step)
        return peak is not None and peak <= budget * aims(model)[0]

    def _planned(
        self,
        model: nn.Module,
        step: Step,
        request: Request,
        room: Room,
        graph: Graph | None,
        alike: Sequence[PlannedBatch],
        strictly: bool,
    ) -> tuple[Step, Planned]:
        """By calls where that is safer and fits, else as was asked; the step that it is for."""
        try:
            return step, self._tried(model, step, request, room, graph, alike, strictly)
        except BudgetError as error:
            names = "" if strictly else self.optimizers.decline()
            if not names:
                raise
            logger.warning(
                "actckpt: with %s, which exists and has not stepped yet, nothing fits: planning "
                "without it, until it steps. %s",
                names,
                error,
            )
        step = dataclasses.replace(step, optimizers=self.optimizers.current())
        return step, self._tried(model, step, request, room, None, alike, strictly)

    def _tried(
        self,
        model: nn.Module,
        step: Step,
        request: Request,
        room: Room,
        graph: Graph | None,
        alike: Sequence[PlannedBatch],
        strictly: bool,
    ) -> Planned:
        """By calls where that is asked for and fits, else as the user has asked."""

        def made(request: Request) -> Planned:
            plans = [e.planned for e in alike if request == self.request or e.by_calls]
            return make_plan(model, step, request, recalled=self.recalled, room=room,
                             graph=graph, earlier=plans)  # fmt: skip

        try:
            return made(request)
        except BudgetError as error:
            if request == self.request or strictly or self.changes.leaves_again(error):
                raise
        logger.warning(
            "actckpt: by calls nothing fits; planning by operations for the forward as it is now, "
            "and again whenever it is another"
        )
        if self.changes.seen:  # what was followed is not the forward any more
            self.entries = [e for e in self.entries if e.by_calls]
            alike = [e for e in alike if e.by_calls]
            self.changes.seen = False
        return made(self.request)

    def _alike(self, key: BatchKey) -> list[PlannedBatch]:
        """Plans that were made for such a batch, the latest first."""
        return [e for e in reversed(self.entries) if e.key == key and not (e.room or e.smallest)]

    def is_trace_of(self, entry: PlannedBatch, step: Step) -> bool:
        """Whether the graph that an entry was planned on is one of this step."""
        graph = entry.planned.graph
        return (
            graph.resident_gradients == step.accumulate
            and entry.optimizers.optimizers == self.optimizers.key()
            and not (entry.backwards or step.backwards or graph.supposed)
            and not asks_for_draws(graph)
        )


def _outlined(step: Step) -> Step | None:
    """A step without its batch's memory, and without what holds a model or its weights."""
    call, target = outline([step.call.args, step.call.kwargs]), outline([step.target])
    if call is None or target is None:
        return None
    args, kwargs = call
    kept = {"call": Call(*args, **kwargs), "target": target[0]}
    return dataclasses.replace(step, **kept, optimizers=(), outside=None)
