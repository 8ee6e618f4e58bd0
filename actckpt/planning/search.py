"""One search for a plan whose dry run fits."""

from __future__ import annotations

import dataclasses
import logging
import math

from torch import nn

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Category, Graph, Storage
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.errors import PlanError
from actckpt.planning.dry_run import dry_run
from actckpt.planning.margin import aims
from actckpt.planning.request import BY_ITSELF, Planned, Request
from actckpt.planning.room import Room
from actckpt.planning.several_backwards import priced
from actckpt.planning.too_small import Smallest, too_small
from actckpt.policies import POLICIES
from actckpt.pricing.price import Price
from actckpt.pricing.simulate import Pricer
from actckpt.progress import stage
from actckpt.rewriting.program import Program, compile_plan
from actckpt.tracing.step import Step

logger = logging.getLogger("actckpt")

_ATTEMPTS = 8


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


def search_for(
    model: nn.Module, step: Step, request: Request, graph: Graph, profile: Profile, room: Room
) -> Search:
    """A search for one graph, as the request's scope and others beside it bound it."""
    pricer = Pricer(graph, profile)
    view = room.of(graph if request.scope == "step" else without_residents(graph))
    return Search(model, step, request, graph, view, profile, pricer, room)


class Search:
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
            return self.dry(self._ask(None))
        aim = math.floor(self.request.budget_bytes * self.aim)
        tried: dict[Plan, Planned] = {}
        view = Pricer(self.view, self.profile)
        untouched = self._untouched(aim, view)
        if untouched is not None:
            return untouched
        asked = aim
        for _ in range(_ATTEMPTS):
            too_small = None
            try:
                plan = self._ask(asked)
            except BudgetError as error:
                too_small = error
            if too_small is not None:  # outside of its handling: one error, one traceback
                return self._smallest(too_small, aim)
            predicted = view.estimate(plan).peak_bytes
            if plan in tried and predicted > asked:
                # a policy of one plan: asking for less changes nothing
                raise self._error(tried[plan])
            planned = tried.get(plan) or self.dry(plan)
            tried[plan] = planned
            over = self.peak_bytes(planned) - aim
            if over <= 0 or planned.dry.diverged:
                return planned
            logger.debug("plan is %d bytes over its aim in the dry run; replanning", over)
            asked = min(asked - over - aim // 1000, predicted - 1)
        raise self._error(min(tried.values(), key=self.peak_bytes))

    def _untouched(self, aim: int, view: Pricer) -> Planned | None:
        """The untouched model where it fits but not the aim; None for policies that always act."""
        budget, policy = self.request.budget_bytes, self.request.policy
        assert budget is not None
        if not isinstance(policy, str) or policy not in BY_ITSELF:
            return None
        most = math.floor(budget * self.untouched_aim)
        if not aim < view.estimate(Plan(policy)).peak_bytes <= most:
            return None
        planned = self.dry(Plan(policy))
        return planned if self.peak_bytes(planned) <= most else None

    def predicted_bytes(self, plan: Plan) -> int:
        """The peak of a plan that the request bounds, as priced."""
        return Pricer(self.view, self.profile).estimate(plan).peak_bytes

    def peak_bytes(self, planned: Planned) -> int:
        """The peak that the request bounds, as dry-run."""
        return self.room.peak_bytes(planned.dry, self.request.scope)

    def _ask(self, budget_bytes: int | None) -> Plan:
        stage("searching for the fastest plan")
        plan = self.request.decide(self.view, self.profile, budget_bytes)
        if not isinstance(plan, Plan):
            raise PlanError(
                f"policy {self.request.policy_name} must return an actckpt.Plan; "
                f"found {type(plan).__name__}"
            )
        return plan

    def dry(self, plan: Plan) -> Planned:
        """A plan with its dry run and its price."""
        stage("running the plan dry")
        program = compile_plan(self.graph, plan, self.profile)
        dry = dry_run(self.model, self.step, self.graph, program, self.profile)
        price = priced(self.pricer.price(plan), self.step, self.graph, self.profile, dry)
        return Planned(self.graph, self.profile, plan, program, self.untouched, price, dry)

    def _error(self, smallest: Planned) -> BudgetError:
        found = Smallest(smallest, self.view, self.peak_bytes(smallest), self.aim)
        return too_small(self.request, found, self.room)

    def _smallest(self, error: BudgetError, aim: int) -> Planned:
        """The policy says that nothing fits; its smallest plan may still do so in the dry run."""
        if error.smallest_plan is None:
            raise error
        planned = self.dry(error.smallest_plan)
        if any(op.nested for op in self.graph.ops) or self.step.second_order:
            # an autograd of the forward's own, or one that makes gradients with a graph, asks for
            # what is dropped, and the price takes it to stay from then on, or knows of no such
            # graph: only the dry run sees that it goes and comes again
            every = dataclasses.replace(
                POLICIES["full"](self.view, self.profile, None), policy=self.request.policy_name
            )
            planned = min(planned, self.dry(every), key=self.peak_bytes)
        if self.peak_bytes(planned) <= aim or planned.dry.diverged:
            return planned
        raise self._error(planned)
