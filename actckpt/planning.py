"""From a model and a training step to a plan that was seen to fit."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from actckpt.dry_run import DryRun, dry_run
from actckpt.errors import BudgetError, PlanError, ReplayError
from actckpt.graph import Category, Graph, Storage
from actckpt.margin import aims
from actckpt.plan import Plan
from actckpt.plan_key import plan_key
from actckpt.policies import POLICIES, Policy
from actckpt.policies.bound import Bound, lower_bound, smallest_peak
from actckpt.pricing.price import Price
from actckpt.pricing.simulate import Pricer
from actckpt.profile import Profile
from actckpt.profiler.build import build_profile
from actckpt.rewriting.program import Program, compile_plan
from actckpt.room import NO_OTHERS, Room
from actckpt.several_backwards import priced, single
from actckpt.tracing.draws import Draws, asks_for_draws, same_course, saved_bytes
from actckpt.tracing.hidden import without_links
from actckpt.tracing.step import Step
from actckpt.tracing.tracer import OTHERWISE, trace_step
from actckpt.units import format_gigabytes, split_gigabytes

logger = logging.getLogger("actckpt")

SCOPES = ("step", "activations")
# policies whose plans belong to the very trace, and which "calls" stands in for
BY_OPERATIONS = ("auto", "optimal")
_ATTEMPTS = 8
# guards that are tried the other way
_GUARDS = 8
DRAWN = (
    "the forward draws which of its parts run: planned by calls for the largest forward found, "
    "with all draws as they come, all high, and all low; one that is larger is planned for when it "
    "is seen"
)
_MARGIN = "margin"
_OTHERS = "other forwards"


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asked for. ``budget_bytes`` None applies the policy without a bound."""

    budget_bytes: int | None
    policy: str | Policy
    scope: str

    @property
    def policy_name(self) -> str:
        """The policy's name for reports."""
        if isinstance(self.policy, str):
            return self.policy
        return getattr(self.policy, "__name__", type(self.policy).__name__)

    @property
    def by_calls(self) -> Request:
        """The same for a forward that changes from step to step."""
        if self.policy not in BY_OPERATIONS:
            return self
        return dataclasses.replace(self, policy="calls")


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with everything that led to it."""

    graph: Graph
    profile: Profile
    plan: Plan
    program: Program
    untouched: Price
    price: Price
    dry: DryRun


@dataclass(frozen=True, slots=True)
class Recalled:
    """A plan that was made earlier, perhaps by another process, for a graph of this `plan_key`."""

    key: str
    plan: Plan
    profile: Profile


@dataclass(frozen=True, slots=True)
class _Verbatim:
    """The policy that has decided already."""

    plan: Plan

    def __call__(self, graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
        return self.plan


def make_plan(
    model: nn.Module,
    step: Step,
    request: Request,
    *,
    progress: bool | None = None,
    recalled: Sequence[Recalled] = (),
    room: Room = NO_OTHERS,
) -> Planned:
    """Traces, profiles, asks the policy, and dry-runs its plan until it fits.

    The model must carry no rewrite, and is left as it was.

    Args:
        recalled: plans made earlier for the same request; one for this very graph is dry-run again
            and taken without asking the policy or measuring.
        room: what others take of the budget meanwhile.

    Raises:
        BudgetError: no plan of the policy fits.
        PlanError: the policy returned something else than a plan for this model.
        TraceError: the step cannot be traced.
    """
    step, graph = _traced(model, step)
    largest = _largest(model, step, graph)
    if largest is not None:
        step, graph = largest
        request = request.by_calls
    planned = _recall(model, step, request, graph, () if room else recalled)
    if planned is not None:
        return planned
    profile = build_profile(graph, progress=progress)
    planned = choose_plan(model, step, request, graph, profile, room)
    return planned if largest is None else noted(planned, DRAWN)


def _traced(model: nn.Module, step: Step) -> tuple[Step, Graph]:
    """The trace of a step as if no guard fires: no error that an answer of ours brought about."""
    first: Exception | None = None
    for _ in range(_GUARDS):
        try:
            return step, trace_step(model, single(step))
        except Exception as error:
            first = first or error
            otherwise = getattr(error, OTHERWISE, None)
            if otherwise is None:
                break
            step = dataclasses.replace(step, answers=otherwise)
    assert first is not None
    raise first


def _largest(model: nn.Module, step: Step, graph: Graph) -> tuple[Step, Graph] | None:
    """The largest of the forwards that a step draws from; None where draws decide nothing.

    It is found with all draws as they come, all high, and all low. A smaller one leaves calls out,
    so that no region may span several.
    """
    if not asks_for_draws(graph):
        return None
    found = [(step, graph)]
    for draws in (Draws.HIGH, Draws.LOW):
        other = dataclasses.replace(step, draws=draws)
        try:
            found.append((other, trace_step(model, single(other))))
        except Exception as error:  # nothing runs, or what the model itself does not survive
            logger.debug("no forward under %s draws: %s", draws, error)
    if all(same_course(graph, other) for _, other in found):
        return None
    step, graph = max(found, key=lambda f: saved_bytes(f[1]))
    logger.info("actckpt: the forward draws what it runs; planning for %s draws", step.draws)
    return step, without_links(graph)


def noted(planned: Planned, note: str) -> Planned:
    """A plan with one more note."""
    if note in planned.plan.notes:
        return planned
    plan = dataclasses.replace(planned.plan, notes=(*planned.plan.notes, note))
    return dataclasses.replace(planned, plan=plan)


def _recall(
    model: nn.Module, step: Step, request: Request, graph: Graph, recalled: Sequence[Recalled]
) -> Planned | None:
    key = plan_key(graph) if recalled else ""
    for earlier in recalled:
        if earlier.key != key:
            continue
        verbatim = dataclasses.replace(request, policy=_Verbatim(earlier.plan))
        try:
            return choose_plan(model, step, verbatim, graph, earlier.profile)
        except (BudgetError, PlanError, ReplayError) as error:
            logger.warning("actckpt: the earlier plan cannot be used, planning again: %s", error)
    return None


def choose_plan(
    model: nn.Module,
    step: Step,
    request: Request,
    graph: Graph,
    profile: Profile,
    room: Room = NO_OTHERS,
) -> Planned:
    """As `make_plan`, for a graph and profile that exist already."""
    pricer = Pricer(graph, profile)
    view = room.of(graph if request.scope == "step" else without_residents(graph))
    search = _Search(model, step, request, graph, view, profile, pricer, room)
    try:
        planned = search.run()
    except ReplayError as error:
        if request.policy not in BY_OPERATIONS:
            raise
        reason = f"its dry run failed: {error}"
    else:
        if not planned.dry.diverged:
            return planned
        reason = f"a second run of the forward is not as the traced one: {planned.dry.diverged}"
        if request.policy not in BY_OPERATIONS:
            raise PlanError(f"the plan recomputes by operations, and {reason}")
    logger.info("actckpt: recomputing by calls: %s", reason)
    search.request = request.by_calls
    return search.run()


def bound_of(planned: Planned, request: Request) -> Bound | None:
    """What no plan for the same request can beat; None where it has no budget."""
    if request.budget_bytes is None:
        return None
    graph = planned.graph if request.scope == "step" else without_residents(planned.graph)
    return lower_bound(graph, planned.profile, request.budget_bytes)


def without_residents(graph: Graph) -> Graph:
    """The graph in which only activations weigh anything: what ``scope="activations"`` bounds.

    A gradient is one until it has become a parameter's ``.grad``.
    """

    def weighed(s: Storage) -> Storage:
        if s.born < 0:
            return dataclasses.replace(s, bytes=0)
        if s.category is Category.GRADIENT and s.settled >= 0:
            return dataclasses.replace(s, died=min(s.died, s.settled))
        return s

    return dataclasses.replace(graph, storages=tuple(weighed(s) for s in graph.storages))


def make_smallest(model: nn.Module, step: Step, request: Request, error: BudgetError) -> Planned:
    """The smallest plan that an error knows of, though it does not fit; else raises the error."""
    if error.smallest_plan is None:
        raise error
    verbatim = dataclasses.replace(
        request, policy=_Verbatim(error.smallest_plan), budget_bytes=None
    )
    return make_plan(model, step, verbatim)


class _Search:
    """One search for a plan whose dry run fits."""

    def __init__(
        self,
        model: nn.Module,
        step: Step,
        request: Request,
        graph: Graph,
        view: Graph,
        profile: Profile,
        pricer: Pricer,
        room: Room,
    ) -> None:
        self.room = room
        self.model = model
        self.step = step
        self.request = request
        self.graph = graph
        self.view = view
        self.profile = profile
        self.pricer = pricer
        self.untouched = self._price_untouched()
        self.aim, self.untouched_aim = aims(model)

    def _price_untouched(self) -> Price:
        found = self.pricer.price(Plan("none"))
        if not self.step.backwards:
            return found
        dry = dry_run(self.model, self.step, self.graph, Program(), self.profile)
        return priced(found, self.step, self.graph, self.profile, dry)

    def run(self) -> Planned:
        """The first plan that fits, or whose dry run leaves the trace: of that nothing is known."""
        if self.request.budget_bytes is None:
            return self._dry(self._ask(None))
        aim = math.floor(self.request.budget_bytes * self.aim)
        tried: dict[Plan, Planned] = {}
        view = Pricer(self.view, self.profile)
        untouched = self._untouched(aim, view)
        if untouched is not None:
            return untouched
        asked = aim
        for _ in range(_ATTEMPTS):
            try:
                plan = self._ask(asked)
            except BudgetError as error:
                return self._smallest(error, aim)
            predicted = view.estimate(plan).peak_bytes
            if plan in tried and predicted > asked:
                # a policy of one plan: asking for less changes nothing
                raise self._too_small(tried[plan])
            planned = tried.get(plan) or self._dry(plan)
            tried[plan] = planned
            over = self.peak_bytes(planned) - aim
            if over <= 0 or planned.dry.diverged:
                return planned
            logger.debug("plan is %d bytes over its aim in the dry run; replanning", over)
            asked = min(asked - over - aim // 1000, predicted - 1)
        raise self._too_small(min(tried.values(), key=self.peak_bytes))

    def _untouched(self, aim: int, view: Pricer) -> Planned | None:
        """The untouched model where it fits but not the aim; None for policies that always act."""
        budget, policy = self.request.budget_bytes, self.request.policy
        assert budget is not None
        if not isinstance(policy, str) or policy not in (*BY_OPERATIONS, "calls"):
            return None
        most = math.floor(budget * self.untouched_aim)
        if not aim < view.estimate(Plan(policy)).peak_bytes <= most:
            return None
        planned = self._dry(Plan(policy))
        return planned if self.peak_bytes(planned) <= most else None

    def peak_bytes(self, planned: Planned) -> int:
        """The peak that the request bounds, as dry-run."""
        return self.room.peak_bytes(planned.dry, self.request.scope)

    def _ask(self, budget_bytes: int | None) -> Plan:
        policy = self.request.policy
        call = POLICIES[policy] if isinstance(policy, str) else policy
        plan = call(self.view, self.profile, budget_bytes)
        if not isinstance(plan, Plan):
            raise PlanError(
                f"policy {self.request.policy_name} must return an actckpt.Plan; "
                f"found {type(plan).__name__}"
            )
        return plan

    def _dry(self, plan: Plan) -> Planned:
        program = compile_plan(self.graph, plan, self.profile)
        dry = dry_run(self.model, self.step, self.graph, program, self.profile)
        price = priced(self.pricer.price(plan), self.step, self.graph, self.profile, dry)
        return Planned(self.graph, self.profile, plan, program, self.untouched, price, dry)

    def _smallest(self, error: BudgetError, aim: int) -> Planned:
        """The policy says that nothing fits; its smallest plan may still do so in the dry run."""
        if error.smallest_plan is None:
            raise error
        planned = self._dry(error.smallest_plan)
        if any(op.nested for op in self.graph.ops):
            # an autograd of the forward's own asks for what is dropped, and the price takes it to
            # stay from then on: only the dry run sees that it goes and comes again
            every = dataclasses.replace(
                POLICIES["full"](self.view, self.profile, None), policy=self.request.policy_name
            )
            planned = min(planned, self._dry(every), key=self.peak_bytes)
        if self.peak_bytes(planned) <= aim or planned.dry.diverged:
            return planned
        raise self._too_small(planned)

    def _too_small(self, smallest: Planned) -> BudgetError:
        budget = self.request.budget_bytes
        assert budget is not None
        needed = math.ceil(self.peak_bytes(smallest) / self.aim) + 1
        parts = smallest.dry.split(self.request.scope)
        if self.room:
            parts[_OTHERS] = self.peak_bytes(smallest) - sum(parts.values())
        # a plan aims below its budget
        parts[_MARGIN] = needed - sum(parts.values())
        parts = dict(sorted(parts.items(), key=lambda x: -x[1]))
        split = ", ".join(
            f"{name} {size}"
            for name, size in zip(parts, split_gigabytes(needed, parts.values()), strict=True)
        )
        what = "step" if self.request.scope == "step" else "activations of a step"
        excluded, why = smallest_peak(self.view, self.profile)
        if budget >= excluded:
            # no instant excludes it alone, all of them together may
            bound = lower_bound(self.view, self.profile, budget)
            if not bound.possible:
                excluded, why = budget + 1, bound.certificate
        verdict = (
            f"No recomputation plan can fit: {why}"
            if budget < excluded
            else f"What no plan of any policy can go below is {format_gigabytes(excluded)} GB"
        )
        return BudgetError(
            f"budget {format_gigabytes(budget)} GB is below the {format_gigabytes(needed)} GB that "
            f"the {what} needs under the smallest plan of policy {self.request.policy_name!r} "
            f"(GB at its peak: {split}; reached {_where(self.graph, smallest.price)}). "
            f"Raise budget_gb to {format_gigabytes(needed, up=True)}, or make the batch smaller. "
            f"{verdict}",
            budget_bytes=budget,
            smallest_bytes=needed,
            excluded_bytes=excluded,
            smallest_plan=smallest.plan,
            split=parts,
        )


def _where(graph: Graph, price: Price) -> str:
    """Where in the step a peak is: the module, or what dominates outside of the modules."""
    if not graph.ops:
        return "nowhere"
    op = graph.ops[price.peak_at]
    owner = graph.ops[op.owner] if op.owner >= 0 else op
    if op.phase == "optimizer":
        return "in the optimizer's step"
    path = graph.stages[owner.stage].path if owner.stage >= 0 else ""
    if path:
        return f"at {path} in the {op.phase} pass"
    return f"at the loss ({op.name}, {op.phase} pass)"
