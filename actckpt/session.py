"""One optimized model: its request, its plans by batch, and the report of the one in force."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from actckpt.backward_watch import watch_backwards
from actckpt.batch_key import BatchKey, Contents, batch_key, contents
from actckpt.company import Place
from actckpt.errors import BudgetError, PlanError
from actckpt.forward_changes import ForwardChanges
from actckpt.graph import Phase
from actckpt.in_use import Use, watch
from actckpt.kept_plans import KeptPlans, asked_otherwise
from actckpt.needs import Needs, note_of
from actckpt.optimizer_listeners import LISTENERS, listen
from actckpt.optimizer_watch import Accounted, OptimizerWatch
from actckpt.participant import Participant, made_among
from actckpt.planned_batch import PlannedBatch, Wanted, say_why
from actckpt.planning import Planned, Recalled, Request, make_plan, make_smallest, noted
from actckpt.reporting.assemble import assemble_report
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.report import Report
from actckpt.rewriting.installing import ENTRIES, install, installed, uninstall
from actckpt.rewriting.program import Program
from actckpt.rewriting.rewrite import Rewrite
from actckpt.rewriting.run import CURRENT
from actckpt.rewriting.sharing import note_optimized
from actckpt.room import NO_OTHERS, Room
from actckpt.several_backwards import notes_on
from actckpt.surroundings import Surroundings
from actckpt.tracing.backwards import Backward, joined
from actckpt.tracing.call import Call, LossFn
from actckpt.tracing.forwards import FORWARD
from actckpt.tracing.lightning import TRAINING_STEP, is_lightning, of_the_batch, refuse_manual
from actckpt.tracing.optimizing import Optimizing
from actckpt.tracing.sharded import refuse_sharded
from actckpt.tracing.step import Step

logger = logging.getLogger("actckpt")

# forwards that are looked at for who calls them
_LOOKS = 3


class Session:
    """Plans on demand, before a forward whose batch no plan covers."""

    def __init__(
        self,
        model: nn.Module,
        request: Request,
        *,
        loss_fn: LossFn | None = None,
        target: Any = None,
        optimizers: tuple[Optimizing, ...] = (),
        accumulate: bool = False,
    ) -> None:
        self._model = weakref.ref(model)
        note_optimized(model)
        # how it is called: a LightningModule by whichever comes first
        self.entry = TRAINING_STEP if is_lightning(model) and loss_fn is None else FORWARD
        self.either = is_lightning(model)
        self.use: Use | None = None
        self.request = request
        self.loss_fn = loss_fn
        self.target = target
        self.accumulate = accumulate
        self.entries: list[PlannedBatch] = []
        self.current: PlannedBatch | None = None
        self.changes = ForwardChanges(request)
        self.surroundings = Surroundings()
        # those that steps were seen to run over one graph; () for one that keeps nothing
        self.backwards: tuple[Backward, ...] = ()
        self.recalled: tuple[Recalled, ...] = ()
        self.optimizers = OptimizerWatch(self._model, optimizers)
        self._participant = Participant(self._model, request, self.optimizers)
        listen(self)

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            PlanError: it no longer exists.
        """
        model = self._model()
        if model is None:
            raise PlanError("the optimized model no longer exists")
        return model

    # ---- planning

    def plan(self, call: Call) -> None:
        """Puts a plan for this batch in force.

        Raises:
            BudgetError, PlanError, TraceError: the model is then as before the call.
        """
        key = self._key(contents(self.model), call.args, call.kwargs)
        step = Step(call, self.loss_fn, self.target, self.optimizers.current(), self.accumulate,
                    entry=self.entry, backwards=self.backwards)  # fmt: skip
        self.either = False
        self._enforce(self._make(key, step))

    def _key(self, found: Contents, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchKey:
        if self.entry == TRAINING_STEP:
            args, kwargs = of_the_batch(args, kwargs), {}
        return batch_key(found, args, kwargs)

    def before_forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: str = FORWARD
    ) -> None:
        """Called before every forward with gradients: another batch may need another plan."""
        if self.current is None:
            self.entry = entry
        found = contents(self.model)
        use = self._watched()
        if not use.forwards:
            refuse_sharded(self.model, found.modules)
        use.forwards += 1
        self.surroundings.note_compiled(self.model, calling=use.forwards <= _LOOKS)
        key = self._key(found, args, kwargs)
        rewrite = installed(self.model)
        self.changes.note_divergence(rewrite)
        grown = self.changes.note_growth(rewrite, self.current)
        self.optimizers.abandon_meter()
        resident = any(p.grad is not None for p in found.parameters)
        if resident:
            self.optimizers.gradients_stay()
        place, needs = self._participant.begin(key, (args, kwargs), resident, self.entries)
        wanted = Wanted(key, needs.resident, self.backwards, self.optimizers, self.changes.seen)
        found_entry = None if grown else self._found(wanted, needs)
        if found_entry is None:
            if self.current is not None and not grown:
                say_why(self.current, wanted, alone=needs.alone, first=use.forwards == 1)
            made = self._anew(Call(*args, **kwargs), key, place, needs)
            found_entry = self._larger(made) if grown else made
        if found_entry is not self.current:
            self._enforce(found_entry)
        self._participant.runs_under(found_entry, place)

    def after_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Called after every forward with gradients: several backwards may run over its graph."""
        if self.current is None or not self.current.states_backwards:
            watch_backwards(self.model, args, kwargs, output, self.learn_backwards)
        self._participant.end(output)

    def _found(self, wanted: Wanted, needs: Needs) -> PlannedBatch | None:
        """A plan that was made and serves."""
        candidates = self.entries if self.current is None else [self.current, *self.entries]
        for entry in candidates:
            if entry.serves(wanted) and self._participant.leaves(entry, needs):
                return entry
        return None

    def _anew(self, call: Call, key: BatchKey, place: Place, needs: Needs) -> PlannedBatch:
        """A plan for a forward that begins."""
        outside = self.surroundings.outside(self.model, self.entry)
        accumulate = self.accumulate or needs.resident
        step = Step(call, self.loss_fn, self.target, self.optimizers.current(), accumulate,
                    entry=self.entry, within=True, outside=outside,
                    backwards=self.backwards)  # fmt: skip
        fits = self._target_fits(key)

        def make(room: Room, too_small: BudgetError | None) -> PlannedBatch:
            return self._make(key, step, fits, room, too_small)

        return made_among(make, place, needs)

    def _larger(self, made: PlannedBatch) -> PlannedBatch:
        """The plan in force or the one just made: of a forward that may be the smaller again."""
        before = self.current
        assert before is not None
        smaller = before if made.planned.dry.nodes > before.planned.dry.nodes else made
        self.entries.remove(smaller)
        return before if smaller is made else made

    def _target_fits(self, key: BatchKey) -> bool:
        """Whether the loss that was given belongs to a batch of this size."""
        if self.entry == TRAINING_STEP:
            return False  # it makes its own
        if self.loss_fn is None or self.target is None or not self.entries:
            return True
        return self.entries[0].key.shapes == key.shapes

    def _make(
        self,
        key: BatchKey,
        step: Step,
        target_fits: bool = True,
        room: Room = NO_OTHERS,
        too_small: BudgetError | None = None,
    ) -> PlannedBatch:
        """A plan that leaves some room, or the smallest that an error knows of."""
        model = self.model
        if CURRENT.run is not None:
            raise PlanError("cannot plan while a planned forward or backward is running")
        if self.entry == TRAINING_STEP:
            refuse_manual(model)
        if not target_fits:
            step = dataclasses.replace(step, loss_fn=None, target=None)
        if self.request.by_calls != self.request and self.surroundings.compiled_inside(model):
            self.changes.seen = True  # by calls, then
        before = uninstall(model)
        try:
            if too_small is None:
                planned = self._planned(key, step, room)
            else:
                planned = make_smallest(model, step, self.request, too_small)
        finally:
            if before is not None:
                install(before)
        if room:
            planned = noted(planned, note_of(room))
        report = assemble_report(planned, self.request, notes_on(step))
        # as they are known now: the step that was planned has no others
        accounted = Accounted.of(self.optimizers.key(), planned.graph)
        self.optimizers.untraced(planned.graph, step.optimizers)
        entry = PlannedBatch(
            key,
            step.accumulate,
            accounted,
            step.backwards,
            planned,
            report,
            room,
            smallest=too_small is not None,
            states_backwards=any(op.nested and op.phase is Phase.LOSS for op in planned.graph.ops),
        )
        self.entries.append(entry)
        return entry

    def _planned(self, key: BatchKey, step: Step, room: Room) -> Planned:
        """By calls where that is safer and fits, else as was asked."""
        request = self.changes.request_for(key, self.entries)
        try:
            return make_plan(self.model, step, request, recalled=self.recalled, room=room)
        except BudgetError as error:
            if request == self.request or self.changes.leaves_again(error):
                raise
        logger.warning(
            "actckpt: by calls nothing fits; planning by operations for the forward as it is now, "
            "and again whenever it is another"
        )
        if self.changes.seen:  # what was followed is not the forward any more
            self.entries = [e for e in self.entries if not e.planned.plan.bursts]
            self.changes.seen = False
        return make_plan(self.model, step, self.request, recalled=self.recalled, room=room)

    def _enforce(self, entry: PlannedBatch) -> None:
        self._watched()
        rewrite = Rewrite(self.model, entry.planned.program, self, entries=(self.entry,))
        install(rewrite)
        self.current = entry

    def wait(self, *, on_top: bool = False) -> None:
        """Plans on the first forward with gradients."""
        self._watched()
        rewrite = Rewrite(self.model, Program(), self, entries=self.entries_waited_for)
        install(rewrite, on_top=on_top)

    # ---- whether it is in use

    @property
    def entries_waited_for(self) -> tuple[str, ...]:
        """The methods of the model that are planned."""
        return ENTRIES if self.either and self.current is None else (self.entry,)

    @property
    def has_plan(self) -> bool:
        """Whether a plan is in force."""
        return self.current is not None

    def begin_again(self) -> None:
        """Something else stands in the place of the forward: plans for it, when it is called."""
        self.entries.clear()
        self.current = None
        self.wait(on_top=True)

    def _successor(self) -> Callable[[nn.Module], None]:
        """Waits as this session did, for whoever does not hold it."""
        request, accumulate = self.request, self.accumulate
        loss_fn = None if self.loss_fn is None else _weakly(self.loss_fn)

        def again(model: nn.Module) -> None:
            loss = loss_fn() if loss_fn is not None else None
            Session(model, request, loss_fn=loss, accumulate=accumulate).wait(on_top=True)

        return again

    def _watched(self) -> Use:
        if self.use is None:
            self.use = watch(self.model, self, self._successor())
        return self.use

    # ---- across processes

    def state_dict(self) -> dict[str, Any]:
        """The plans made so far as JSON data, with what they were asked for."""
        plans = dict.fromkeys([*(e.to_keep() for e in self.entries), *self.recalled])
        kept = KeptPlans(tuple(plans), self.backwards, self.changes.seen)
        return kept.to_json(self.request)

    def load_state_dict(self, state: dict[str, Any]) -> str:
        """Takes plans that another process made; "" or why this session plans anew instead.

        They are put in force by the next forwards, each for the very step that it was made for.

        Raises:
            PlanError: the state is none of a session.
        """
        why = asked_otherwise(state, self.request)
        if why:
            return why
        kept = KeptPlans.from_json(state)
        self.recalled, self.backwards = kept.plans, kept.backwards
        self.changes.seen = kept.changes
        self.entries.clear()
        self.current = None
        self.wait()
        return ""

    # ---- what is learned later

    def learn(self, optimizer: torch.optim.Optimizer) -> None:
        """If an optimizer trains this model, the next forward plans with it."""
        self.optimizers.know(optimizer)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step."""
        self.optimizers.before_step(optimizer)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped: if it trains this model, the next forward plans with it."""
        model = self._model()
        if model is None:
            self.close()
        else:
            self.optimizers.stepped(optimizer)

    def learn_backwards(self, found: tuple[Backward, ...]) -> None:
        """A step runs these over the graph of one forward: the next forward plans with them."""
        known = joined(self.backwards, found)
        if known == self.backwards:
            return
        if not self.backwards and self.current is not None and self.request.budget_bytes:
            logger.warning(
                "actckpt: a backward keeps its graph (retain_graph or create_graph) for another "
                "one, for which this step was not planned: it may take more memory than the "
                "budget. From the next step on the plan is made for what this one does"
            )
        self.backwards = known

    def learn_measured(self, measurement: Measurement, *, untouched: bool = False) -> None:
        """Writes what was measured into the report in force."""
        if self.current is not None:
            self.current.learn_measured(measurement, untouched=untouched)

    def close(self) -> None:
        """Watches no optimizer any more."""
        LISTENERS.discard(self)
        self.optimizers.abandon_meter()

    def report(self) -> Report:
        """The report of the plan in force.

        Raises:
            PlanError: nothing was planned yet.
        """
        if self.current is None:
            raise PlanError(
                "this model plans on its first forward with gradients, which has not happened yet; "
                "run a training step, or pass batch= to actckpt.optimize"
            )
        return self.current.full_report(self.request)

    # ---- copies

    def copied(self, model: nn.Module) -> Session:
        """The session of a deep copy: same request and plans, an optimizer still to be learned."""
        clone = Session(model, self.request, loss_fn=self.loss_fn, target=self.target,
                        accumulate=self.accumulate)  # fmt: skip
        clone.entry, clone.either = self.entry, self.either
        clone.use = watch(model, clone, clone._successor(), copied=True)
        clone.backwards = self.backwards
        clone.entries = [
            dataclasses.replace(e, optimizers=Accounted(None, 0)) for e in self.entries
        ]
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        raise TypeError("a session is copied by the rewrite that holds it")


def _weakly(loss_fn: LossFn) -> Callable[[], LossFn | None]:
    """A weak reference; to nothing where there can be none."""
    try:
        return weakref.ref(loss_fn)
    except TypeError:
        return lambda: None


def session_of(model: nn.Module) -> Session | None:
    """The session of an optimized model."""
    rewrite = installed(model)
    planner = rewrite.planner if rewrite is not None else None
    return planner if isinstance(planner, Session) else None
