"""One optimized model: its request, its plans by batch, and the report of the one in force."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from actckpt.data.budget_error import BudgetError
from actckpt.errors import ActckptError, PlanError
from actckpt.planning.accumulation import accumulating
from actckpt.planning.request import Recalled, Request
from actckpt.planning.room import Room
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.report import Report
from actckpt.rewriting.installing import ENTRIES, install, installed, uninstall
from actckpt.rewriting.program import Program
from actckpt.rewriting.rewrite import Rewrite
from actckpt.rewriting.sharing import note_optimized
from actckpt.session.backward_watch import watch_backwards
from actckpt.session.batch_key import Arguments, BatchKey, batch_key
from actckpt.session.company import Place
from actckpt.session.forward_changes import ForwardChanges
from actckpt.session.in_use import Use, forget, watch
from actckpt.session.kept_plans import KeptPlans, asked_otherwise
from actckpt.session.model_contents import ModelContents
from actckpt.session.needs import Needs
from actckpt.session.optimizer_listeners import LISTENERS, listen
from actckpt.session.optimizer_watch import OptimizerWatch
from actckpt.session.optimizers_seen import Accounted
from actckpt.session.participant import Participant, made_among
from actckpt.session.planned_batch import PlannedBatch, Wanted, say_why
from actckpt.session.planner import Planner
from actckpt.session.surroundings import Surroundings
from actckpt.tracing.backwards import Backward, joined
from actckpt.tracing.call import Call, LossFn
from actckpt.tracing.forwards import FORWARD
from actckpt.tracing.lightning import TRAINING_STEP, is_lightning, next_node, of_the_batch
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
        # gradients were there when a backward began, or will be: so for every plan from then on
        self.accumulates = accumulate
        self.current: PlannedBatch | None = None
        self.changes = ForwardChanges(request)
        self.surroundings = Surroundings()
        # those that steps were seen to run over one graph; () for one that keeps nothing
        self.backwards: tuple[Backward, ...] = ()
        self.optimizers = OptimizerWatch(self._model, optimizers)
        self._planner = Planner(self._model, request, self.optimizers, self.changes)
        self._participant = Participant(self._model, request, self.optimizers)
        self._contents = ModelContents(self._model)
        # the tensors that the forward which runs was given
        self._given: list[weakref.ref[torch.Tensor]] = []
        # number of the first node that it adds to autograd's graph
        self._first = 0
        # in this step it was said that backwards were not planned for
        self._told_backwards = False
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

    @property
    def entries(self) -> list[PlannedBatch]:
        """The plans made so far, in order."""
        return self._planner.entries

    @property
    def recalled(self) -> tuple[Recalled, ...]:
        """The plans that another process made."""
        return self._planner.recalled

    # ---- planning

    def plan(self, call: Call) -> None:
        """Puts a plan for this batch in force.

        Raises:
            BudgetError, PlanError, TraceError: the model is then as before the call.
        """
        self._note_beside()
        key = batch_key(self._contents.now(), self._arguments(call.args, call.kwargs))
        self.optimizers.foresee()
        step = Step(call, self.loss_fn, self.target, self.optimizers.current(), self.accumulate,
                    entry=self.entry, backwards=self.backwards)  # fmt: skip
        self.either = False
        self._enforce(self._planner.make(key, step, self._request_for(key)))

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if self.entry == TRAINING_STEP:
            args, kwargs = of_the_batch(args, kwargs), {}
        return Arguments.of(args, kwargs)

    def before_forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: str = FORWARD
    ) -> bool:
        """Called before every forward with gradients: another batch may need another plan.

        Returns:
            Whether there is another one in force now.
        """
        if self.current is None:
            self.entry = entry
        model, found = self.model, self._contents.now()
        use = self._watched()
        if not use.forwards:
            refuse_sharded(model, found.modules)
            self._note_beside()
        use.forwards += 1
        self.surroundings.note_compiled(model, calling=use.forwards <= _LOOKS)
        computed = found.are_computed()
        if computed:
            self.surroundings.note_computed()
        arguments = self._arguments(args, kwargs)
        key = batch_key(found, arguments)
        rewrite = installed(model)
        self.changes.note_divergence(rewrite)
        grown = self.changes.note_growth(rewrite, self.current)
        self.optimizers.abandon_meter()
        resident = found.has_gradients(computed)
        if resident:
            self.optimizers.gradients_stay()
        batch = arguments.tensors
        weights: list[torch.Tensor] = []
        if computed:
            weights += (p for p in found.parameters if not p.is_leaf)
        place, needs = self._participant.begin(key, batch, weights, resident, self.entries)
        self.accumulates = self.accumulates or needs.resident or accumulating()
        if use.forwards == 1:
            self.optimizers.foresee()
        backwards = place.backwards()
        wanted = Wanted(key, needs.resident, self.backwards if backwards is None else backwards,
                        self.optimizers, self.changes.seen)  # fmt: skip
        found_entry = None if grown else self._found(wanted, needs)
        if found_entry is None:
            if self.current is not None and not grown:
                say_why(self.current, wanted, alone=needs.alone, first=use.forwards == 1)
            made = self._anew_or_off(Call(*args, **kwargs), wanted, place, needs, grown)
            found_entry = self._larger(made) if grown else made
        another = found_entry is not self.current
        if another:
            self._enforce(found_entry)
        self._participant.runs_under(found_entry, place)
        self._given = [weakref.ref(t) for t in batch]
        self._first = next_node()
        return another

    def after_forward(self, output: Any) -> None:
        """Called after every forward with gradients: several backwards may run over its graph."""
        current = self.current
        learner = None if current is not None and current.states_backwards else self
        found = watch_backwards(
            output, self._model, self._given, learner, self._participant.seen(),
            () if current is None else current.backwards, self._first,
        )  # fmt: skip
        self._participant.end(found)

    def _note_beside(self) -> None:
        if self.request.budget_bytes is not None:
            self.surroundings.note_beside(self.model)

    def _found(self, wanted: Wanted, needs: Needs) -> PlannedBatch | None:
        """A plan that was made and serves."""
        candidates = self.entries if self.current is None else [self.current, *self.entries]
        if self.current is not None and self.current.by_calls:
            # one by operations is for this very batch, and faster
            candidates = sorted(candidates, key=lambda e: e.by_calls)
        for entry in candidates:
            if entry.serves(wanted) and self._participant.leaves(entry, needs):
                return entry
        return None

    def _anew_or_off(
        self, call: Call, wanted: Wanted, place: Place, needs: Needs, grown: bool
    ) -> PlannedBatch:
        """As `_anew`; where there is no first plan the model is as before `actckpt.optimize`."""
        try:
            return self._anew(call, wanted, place, needs, grown)
        except BudgetError:
            if self.current is None:
                self.close()
                forget(self.model)
                uninstall(self.model)
            raise

    def _anew(
        self, call: Call, wanted: Wanted, place: Place, needs: Needs, grown: bool
    ) -> PlannedBatch:
        """A plan for a forward that begins, or for the longest batch that was planned for."""
        key = wanted.key
        request = self._request_for(key)
        longest = self._longest(wanted) if needs.alone and not grown else None
        if longest is not None:
            step = self._step_again(longest, wanted.backwards)
            traced = longest.planned.graph if self._planner.is_trace_of(longest, step) else None
            try:
                made = self._planner.make(longest.key, step, self.request.by_calls, graph=traced,
                                  strictly=True)  # fmt: skip
                if made.by_calls:
                    return made
                self.entries.remove(made)  # by operations it is for that batch alone
            except ActckptError as error:
                logger.info("actckpt: planning for the batch at hand: for the longest %s", error)
        outside = self.surroundings.outside(self.model, self.entry)
        step = Step(call, self.loss_fn, self.target, self.optimizers.current(),
                    self.accumulates or needs.resident, entry=self.entry, within=True,
                    outside=outside, backwards=wanted.backwards)  # fmt: skip
        fits = self._target_fits(key)
        if not fits:
            step = dataclasses.replace(step, loss_fn=None, target=None)

        # what has grown is another forward than before
        keeps = not grown

        def make(room: Room, too_small: BudgetError | None) -> PlannedBatch:
            return self._planner.make(key, step, request, room, too_small, keeps=keeps)

        return made_among(make, place, needs, request.unit)

    def _longest(self, wanted: Wanted) -> PlannedBatch | None:
        """What was planned for a larger batch than the one that comes: it is planned for again."""
        larger = (e for e in self.entries if e.key != wanted.key and e.covers(wanted))
        return max(larger, key=lambda e: e.key.elements, default=None)

    def _step_again(self, entry: PlannedBatch, backwards: tuple[Backward, ...]) -> Step:
        """The step that a plan was made for, as steps are known to be now."""
        assert entry.step is not None
        within = entry.step.within
        return dataclasses.replace(
            entry.step,
            optimizers=self.optimizers.current(),
            accumulate=self.accumulates,
            outside=self.surroundings.outside(self.model, self.entry) if within else None,
            backwards=backwards,
        )

    def _request_for(self, key: BatchKey) -> Request:
        """By calls where that is safer."""
        if self.request.by_calls != self.request and self.surroundings.compiled_inside(self.model):
            self.changes.seen = True
        return self.changes.request_for(key, self.entries)

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
        self._planner.recalled, self.backwards = kept.plans, kept.backwards
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
            self._told_backwards = False

    def learn_backwards(self, found: tuple[Backward, ...], planned: tuple[Backward, ...]) -> None:
        """A step runs these over the graph of one forward: the next such one plans with them.

        Args:
            planned: what this one was planned for.
        """
        self.backwards = joined(self.backwards, found)
        if joined(planned, found) == planned or self._told_backwards:
            return
        self._told_backwards = True
        if self.current is not None and self.request.budget_bytes:
            logger.warning(
                "actckpt: a backward keeps its graph (retain_graph or create_graph) for another "
                "one, for which this step was not planned: it may take more memory than the "
                "budget. From the next step on the plan is made for what this one does"
            )

    def learn_measured(self, measurement: Measurement, *, untouched: bool = False) -> None:
        """Writes what was measured into the report in force."""
        if self.current is not None:
            self.current.learn_measured(measurement, untouched=untouched)

    def close(self) -> None:
        """Watches no optimizer any more."""
        LISTENERS.pop(self, None)
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
        return self._report_of(self.current)

    def report_of_largest(self) -> Report:
        """The report of the plan for the largest of the batches that came, the latest such.

        Raises:
            PlanError: nothing was planned yet.
        """
        largest = max(reversed(self.entries), key=lambda e: e.key.elements, default=None)
        return self.report() if largest is None else self._report_of(largest)

    def _report_of(self, entry: PlannedBatch) -> Report:
        report = entry.full_report(self.request)
        return dataclasses.replace(report, notes=(*report.notes, *self.surroundings.beside))

    # ---- copies

    def copied(self, model: nn.Module) -> Session:
        """The session of a deep copy: same request and plans, an optimizer still to be learned."""
        clone = Session(model, self.request, loss_fn=self.loss_fn, target=self.target,
                        accumulate=self.accumulate)  # fmt: skip
        clone.entry, clone.either = self.entry, self.either
        clone.use = watch(model, clone, clone._successor(), copied=True)
        clone.backwards = self.backwards
        clone._planner.entries = [
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
