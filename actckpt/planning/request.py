"""What was asked for, and what came of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.planning.dry_run import DryRun
from actckpt.policies import POLICIES, SEARCHES, Policy
from actckpt.policies.solver.handed_on import Way
from actckpt.policies.solver.work import DEFAULT_EFFORT
from actckpt.pricing.price import Price
from actckpt.rewriting.program import Program
from actckpt.units import GIGABYTES, ByteUnit

SCOPES = ("step", "activations")
# policies whose plans belong to the very trace, and which "calls" stands in for
BY_OPERATIONS = ("auto", "optimal")
# those that answer with the fastest plan that they find, and recompute no more than they must
BY_ITSELF = (*BY_OPERATIONS, "calls")


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asked for.

    Args:
        budget_bytes: None applies the policy without a bound.
        unit: in which the budget was given, and errors are written.
        effort: of the search; None: as the policy has it.
        beside_bytes: that were taken off the budget, for what lies beside the model.
    """

    budget_bytes: int | None
    policy: str | Policy
    scope: str
    unit: ByteUnit = dataclasses.field(default=GIGABYTES, compare=False)
    effort: float | None = None
    beside_bytes: int = 0

    @property
    def policy_name(self) -> str:
        """The policy's name for reports."""
        if isinstance(self.policy, str):
            return self.policy
        return getattr(self.policy, "__name__", type(self.policy).__name__)

    @property
    def decide(self) -> Policy:
        """The policy itself."""
        if not isinstance(self.policy, str):
            return self.policy
        if self.effort is None:
            return POLICIES[self.policy]
        return SEARCHES[self.policy](self.effort)

    @property
    def by_calls(self) -> Request:
        """The same for a forward that changes from step to step."""
        if self.policy not in BY_OPERATIONS:
            return self
        return dataclasses.replace(self, policy="calls")


def effort_in_force(policy_name: str | None, effort: float | None) -> float | None:
    """The effort of a policy that searches, also where none was asked for."""
    return DEFAULT_EFFORT if effort is None and policy_name in SEARCHES else effort


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with everything that led to it.

    Attributes:
        ways: that the search for it chose among, for a later search of the same forward.
    """

    graph: Graph
    profile: Profile
    plan: Plan
    program: Program
    untouched: Price
    price: Price
    dry: DryRun
    ways: tuple[Way, ...] = ()


@dataclass(frozen=True, slots=True)
class Recalled:
    """A plan that was made earlier, perhaps by another process, for a graph of this `plan_key`."""

    key: str
    plan: Plan
    profile: Profile


@dataclass(frozen=True, slots=True)
class Verbatim:
    """The policy that has decided already."""

    plan: Plan

    def __call__(self, graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
        return self.plan


def noted(planned: Planned, note: str) -> Planned:
    """A plan with one more note."""
    if note in planned.plan.notes:
        return planned
    plan = dataclasses.replace(planned.plan, notes=(*planned.plan.notes, note))
    return dataclasses.replace(planned, plan=plan)
