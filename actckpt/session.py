"""One optimized model: its request, its plans by batch, and the report of the one in force."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actckpt.backward_watch import watch_backwards
from actckpt.batch_key import BatchKey, Contents, batch_key, contents
from actckpt.company import Company, Member, Place, follow, join
from actckpt.errors import BudgetError, PlanError
from actckpt.graph import Phase
from actckpt.in_use import Use, watch
from actckpt.needs import Bounds, Needs, note_of, resident_bytes_beside, together, warning_of
from actckpt.optimizer_listeners import LISTENERS, listen
from actckpt.optimizer_watch import Accounted, OptimizerWatch
from actckpt.plan import Plan
from actckpt.plan_key import plan_key
from actckpt.planning import Planned, Recalled, Request, make_plan, make_smallest, noted
from actckpt.profile import Profile
from actckpt.reporting.assemble import assemble_report, with_bound
from actckpt.reporting.measurement import Measurement
from actckpt.reporting.report import Figures, Report
from actckpt.rewriting.patch import ENTRIES, Rewrite, install, installed, uninstall
from actckpt.rewriting.program import Program
from actckpt.rewriting.run import CURRENT
from actckpt.rewriting.sharing import note_optimized
from actckpt.room import NO_OTHERS, Room
from actckpt.several_backwards import notes_on
from actckpt.tracing.backwards import Backward, joined
from actckpt.tracing.call import Call, LossFn
from actckpt.tracing.compiled import compiled_inside, is_compiled
from actckpt.tracing.forwards import FORWARD, around
from actckpt.tracing.lightning import TRAINING_STEP, is_lightning, of_the_batch, refuse_manual
from actckpt.tracing.optimizing import Optimizing
from actckpt.tracing.sharded import refuse_sharded
from actckpt.tracing.step import Step

logger = logging.getLogger("actckpt")

# forwards that are looked at for who calls them
_LOOKS = 3

# times that a session plans again because a forward was larger
_MOST_GROWN = 8
# plans by operations that a forward may leave in their first step where by calls nothing fits
_MOST_LEFT_AT_ONCE = 1


@dataclass(slots=True)
class _Entry:
    """A plan that was made for one batch."""

    key: BatchKey
    accumulate: bool
    optimizers: Accounted
    backwards: tuple[Backward, ...]
    planned: Planned
    report: Report
    room: Room = NO_OTHERS
    # too large, but none is smaller
    smallest: bool = False
    bounded: bool = False
    kept: Recalled | None = None
    # whether the loss that was given runs backwards itself: the plan is made with those
    states_backwards: bool = False

    def to_keep(self) -> Recalled:
        """The plan for another process; made once, for saving often."""
        if self.kept is None:
            planned = self.planned
            self.kept = Recalled(plan_key(planned.graph), planned.plan, planned.profile)
        return self.kept


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
        self.entries: list[_Entry] = []
        self.current: _Entry | None = None
        # whether a forward was not the traced one
        self.changes = False
        # the last rewrite that a forward left, and how many were left in their very first one
        self._left: Rewrite | None = None
        self._left_at_once = 0
        # those that steps were seen to run over one graph; () for one that keeps nothing
        self.backwards: tuple[Backward, ...] = ()
        self._told_around = self._told_compiled = self._told_inside = False
        self._grown = 0
        # companies that began with a forward of this model
        self.led: list[Company] = []
        self._member: Member | None = None
        self._beside: dict[tuple[int, int], int] = {}
        self.recalled: tuple[Recalled, ...] = ()
        self.optimizers = OptimizerWatch(self._model, optimizers)
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
        self.note_compiled(calling=use.forwards <= _LOOKS)
        key = self._key(found, args, kwargs)
        self._note_divergence()
        grown = self._note_growth()
        self.optimizers.abandon_meter()
        resident = any(p.grad is not None for p in found.parameters)
        if resident:
            self.optimizers.gradients_stay()
        place = join(self, key, (args, kwargs))
        needs = Needs(resident)
        if not place.alone:
            bounds = Bounds.of(self.model, self.request)
            needs = bounds.needs(place, resident, self._own(place))
        found_entry = None if grown else self._found(key, needs)
        if found_entry is None:
            if self.current is not None and not grown:
                self._say_why(self.current, key, needs, first=use.forwards == 1)
            made = self._anew(Call(*args, **kwargs), key, place, needs)
            found_entry = self._larger(made) if grown else made
        if found_entry is not self.current:
            self._enforce(found_entry)
        place.runs_under(found_entry.planned, found_entry.smallest)
        self._member = place.member

    def after_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Called after every forward with gradients: several backwards may run over its graph.

        As long as that is alive, it counts.
        """
        if self.current is None or not self.current.states_backwards:
            watch_backwards(self.model, args, kwargs, output, self.learn_backwards)
        if self._member is not None:
            follow(self._member, output)
            self._member = None

    def _found(self, key: BatchKey, needs: Needs) -> _Entry | None:
        """A plan that was made and serves."""
        candidates = self.entries if self.current is None else [self.current, *self.entries]
        for entry in candidates:
            if self._serves(entry, key, needs.resident) and self._leaves(entry, needs):
                return entry
        return None

    def _leaves(self, entry: _Entry, needs: Needs) -> bool:
        """Whether a plan leaves what it must to other forwards."""
        if needs.alone:
            return not entry.room
        if entry.smallest:
            return entry.room.beside_bytes <= needs.beside_bytes
        return Bounds.of(self.model, self.request).leaves(entry.planned, needs)

    def _own(self, place: Place) -> Planned | None:
        """A plan that was made for such a batch, the latest."""
        key = place.member.key
        made = (e.planned for e in reversed(self.entries) if e.key.covers(key))
        return next(made, place.known[0].planned if place.known else None)

    def resident_bytes_beside(self, other: Session) -> int:
        """What of this model is on the device and is not the other's, too.

        0 where only activations are bounded.
        """
        model, others = self._model(), other._model()
        if model is None or others is None or other.request.scope != "step":
            return 0
        optimizers = self.optimizers.current()
        known = (id(other), len(optimizers))
        if known not in self._beside:
            held = [o.optimizer for o in optimizers]
            self._beside[known] = resident_bytes_beside(model, held, others)
        return self._beside[known]

    def _anew(self, call: Call, key: BatchKey, place: Place, needs: Needs) -> _Entry:
        """A plan for a forward that begins."""
        stands = around(self.model, self.entry)
        if stands.unknown and not self._told_around:
            self._told_around = True
            logger.warning(
                "actckpt: planning for the forward of the %s beneath %s, which wraps it: what that "
                "does to inputs and outputs takes memory that is not counted",
                type(self.model).__name__,
                stands.unknown,
            )
        accumulate = self.accumulate or needs.resident
        step = Step(call, self.loss_fn, self.target, self.optimizers.current(), accumulate,
                    entry=self.entry, within=True, outside=stands.outside,
                    backwards=self.backwards)  # fmt: skip
        fits = self._target_fits(key)
        try:
            return self._make(key, step, fits, needs.room(place))
        except BudgetError as error:
            if place.alone:
                raise
            too_small = error
        if place.later and (least := place.needed_later_bytes()):
            # its share is less than it can hold: what later ones can do without
            needs = needs.at_most(needs.rest_bytes - least)
            try:
                return self._make(key, step, fits, needs.room(place))
            except BudgetError as error:
                raise together(error, place) from error
        if place.is_final():
            raise together(too_small, place) from too_small
        if not place.later:
            logger.warning("actckpt: %s", warning_of(too_small, place, needs))
        return self._make(key, step, fits, needs.room(place), too_small)

    def _larger(self, made: _Entry) -> _Entry:
        """The plan in force or the one just made: of a forward that may be the smaller again."""
        before = self.current
        assert before is not None
        smaller = before if made.planned.dry.nodes > before.planned.dry.nodes else made
        self.entries.remove(smaller)
        return before if smaller is made else made

    def note_compiled(self, *, calling: bool = False) -> None:
        """Says once that a compiled model runs as it is written."""
        if self._told_compiled or not is_compiled(self.model, calling=calling):
            return
        self._told_compiled = True
        logger.warning(
            "actckpt: the %s is compiled, and what is planned runs eagerly: the plan holds, and "
            "nothing of the model is compiled. Leave torch.compile out, or call "
            "actckpt.revert(model) to train it compiled without a plan",
            type(self.model).__name__,
        )

    def _note_compiled_inside(self) -> None:
        """Compiled modules inside save other tensors than they would as written: by calls, then."""
        inside = compiled_inside(self.model)
        if not inside or self.request.by_calls == self.request:
            return
        if not self._told_inside:
            self._told_inside = True
            logger.warning(
                "actckpt: %d modules inside the %s are compiled (%s, ...): planning by calls. What "
                "is recomputed runs as written; what others save for backward is taken to be what "
                "they save as written",
                len(inside),
                type(self.model).__name__,
                inside[0],
            )
        self.changes = True

    def _say_why(self, planned: _Entry, key: BatchKey, needs: Needs, *, first: bool) -> None:
        """Says why there is another plan: a warning where the batch given was never used."""
        differs = planned.key.difference(key)
        if first and differs:
            logger.warning(
                "actckpt: planning again: the first forward is not the one that batch= stood for: "
                "%s. The report is of the new plan; without batch= there is only that one",
                differs,
            )
        else:
            logger.info("actckpt: planning again: %s", self._reason(key, needs))

    def _note_divergence(self) -> None:
        """A forward was not the one that was planned for: no plan by operations will do."""
        rewrite = installed(self.model)
        # a policy of the user's own would plan the same again
        if rewrite is not None and rewrite.diverged and self.request.by_calls != self.request:
            self.changes = True
            if rewrite is not self._left:
                # in its very first step: the trace was of another forward, and would be again
                self._left_at_once = self._left_at_once + 1 if rewrite.runs == 1 else 0
            self._left = rewrite

    def _note_growth(self) -> bool:
        """Whether the last forward was larger than the one that was planned for by calls."""
        rewrite, current = installed(self.model), self.current
        if rewrite is None or current is None or current.planned.plan.bursts:
            return False
        planned = current.planned.dry.nodes
        if rewrite.nodes <= planned or self.request.budget_bytes is None:
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

    def _request_for(self, key: BatchKey) -> Request:
        """By calls, where forwards or shapes change from step to step."""
        varies = any(e.planned.plan.bursts and e.key.shapes != key.shapes for e in self.entries)
        return self.request.by_calls if self.changes or varies else self.request

    def _target_fits(self, key: BatchKey) -> bool:
        """Whether the loss that was given belongs to a batch of this size."""
        if self.entry == TRAINING_STEP:
            return False  # it makes its own
        if self.loss_fn is None or self.target is None or not self.entries:
            return True
        return self.entries[0].key.shapes == key.shapes

    def _serves(self, entry: _Entry, key: BatchKey, resident: bool) -> bool:
        if entry.planned.plan.bursts and (self.changes or entry.key != key):
            return False  # operations of these very shapes
        return (
            entry.key.covers(key)
            and (entry.accumulate or not resident)
            and self.optimizers.covered(entry.optimizers)
            and entry.backwards == self.backwards
        )

    def _reason(self, key: BatchKey, needs: Needs) -> str:
        assert self.current is not None
        if not needs.alone:
            return "graphs of other forwards are alive beside this one's"
        if self.changes:
            return "the forward changes from step to step: by calls from now on, if they fit"
        if not self.current.key.covers(key):
            return "the batch or the model's state is not the one planned for"
        if needs.resident and not self.current.accumulate:
            return "gradients are resident when the step begins (accumulate=True plans for that)"
        if self.current.backwards != self.backwards:
            return "several backwards run over one graph, or one that keeps it"
        if not self.optimizers.key() <= (self.current.optimizers.optimizers or frozenset()):
            return "an optimizer has become known, or when it steps, or what its step takes"
        return "the optimizer holds more than when the plan was made"

    def _make(
        self,
        key: BatchKey,
        step: Step,
        target_fits: bool = True,
        room: Room = NO_OTHERS,
        too_small: BudgetError | None = None,
    ) -> _Entry:
        """A plan that leaves some room, or the smallest that an error knows of."""
        model = self.model
        if CURRENT.run is not None:
            raise PlanError("cannot plan while a planned forward or backward is running")
        if self.entry == TRAINING_STEP:
            refuse_manual(model)
        if not target_fits:
            step = dataclasses.replace(step, loss_fn=None, target=None)
        self._note_compiled_inside()
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
        smallest = too_small is not None
        entry = _Entry(
            key, step.accumulate, accounted, step.backwards, planned, report, room, smallest
        )
        entry.states_backwards = any(
            op.nested and op.phase is Phase.LOSS for op in planned.graph.ops
        )
        self.entries.append(entry)
        return entry

    def _planned(self, key: BatchKey, step: Step, room: Room) -> Planned:
        """By calls where that is safer and fits, else as was asked."""
        request = self._request_for(key)
        try:
            return make_plan(self.model, step, request, recalled=self.recalled, room=room)
        except BudgetError as error:
            if request == self.request:
                raise
            if self._left_at_once > _MOST_LEFT_AT_ONCE:
                assert self._left is not None
                error.add_note(
                    "actckpt: this is by calls. By operations it would fit, but the forward leaves "
                    f"such a plan in its first step, again and again: {self._left.diverged}"
                )
                raise
        logger.warning(
            "actckpt: by calls nothing fits; planning by operations for the forward as it is now, "
            "and again whenever it is another"
        )
        if self.changes:  # what was followed is not the forward any more
            self.entries = [e for e in self.entries if not e.planned.plan.bursts]
            self.changes = False
        return make_plan(self.model, step, self.request, recalled=self.recalled, room=room)

    def _enforce(self, entry: _Entry) -> None:
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
        made = [entry.to_keep() for entry in self.entries]
        return {
            "budget_bytes": self.request.budget_bytes,
            "policy": self.request.policy_name,
            "scope": self.request.scope,
            "changes": self.changes,
            "backwards": [b.to_json() for b in self.backwards],
            "plans": [
                {"key": r.key, "plan": r.plan.to_json(), "profile": r.profile.to_json()}
                for r in dict.fromkeys([*made, *self.recalled])
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> str:
        """Takes plans that another process made; "" or why this session plans anew instead.

        They are put in force by the next forwards, each for the very step that it was made for.

        Raises:
            PlanError: the state is none of a session.
        """
        for name, mine in (
            ("budget_bytes", self.request.budget_bytes),
            ("policy", self.request.policy_name),
            ("scope", self.request.scope),
        ):
            if state.get(name) != mine:
                return f"{name} was {state.get(name)!r} and is now {mine!r}"
        try:
            self.recalled = tuple(
                Recalled(p["key"], Plan.from_json(p["plan"]), Profile.from_json(p["profile"]))
                for p in state["plans"]
            )
            self.backwards = tuple(Backward.from_json(b) for b in state.get("backwards", ()))
        except (KeyError, TypeError) as error:
            raise PlanError(f"not the plans of a session: {error!r}") from error
        self.changes = bool(state.get("changes"))
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
        if self.current is None:
            return
        figures = Figures(measurement.peak_bytes, measurement.step_s, measurement.added_bytes)
        report = self.current.report
        name = "baseline" if untouched else "planned"
        arm = dataclasses.replace(getattr(report, name), measured=figures)
        self.current.report = dataclasses.replace(report, **{name: arm})

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
        entry = self.current
        if not entry.bounded:
            # only readers of reports need it
            entry.report = with_bound(entry.report, entry.planned, self.request)
            entry.bounded = True
        return entry.report

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
