"""What a user asks of a plan, checked before a model is looked at."""

from __future__ import annotations

from collections.abc import Callable

from actckpt.budget import Left, budget_bytes
from actckpt.data.budget_error import BudgetError
from actckpt.errors import ArgumentError, PlanError
from actckpt.planning.request import SCOPES, Request
from actckpt.policies import POLICIES, SEARCHES, Policy
from actckpt.policies.auto import Auto
from actckpt.policies.by_calls import ByCalls
from actckpt.policies.optimal import Optimal
from actckpt.policies.solver.work import checked_effort
from actckpt.units import unit_of


def request_of(
    budget_gb: float | str | None,
    policy: str | Policy,
    scope: str,
    memory_bytes: Callable[[], int],
    effort: float | None = None,
) -> Request:
    """The request that these arguments of `actckpt.optimize` make.

    Args:
        memory_bytes: of the model's device; called where a share of it is asked for.

    Raises:
        BudgetError: ``budget_gb`` is none, or there must be one.
        PlanError: there is no such policy or scope.
        ArgumentError: the policy takes no effort, or not this one.
    """
    # a policy that is made of one of these is a policy of the user's own
    is_search = type(policy) in SEARCHES.values()
    if effort is None and is_search and isinstance(policy, Auto | ByCalls | Optimal):
        effort = policy.effort
        policy = next(name for name, kind in SEARCHES.items() if type(policy) is kind)
    if budget_gb is None and policy == "auto":
        raise BudgetError(
            "budget_gb=None applies a policy without a bound, and policy 'auto' needs one: "
            "pass a budget in GB, or a policy such as 'full'"
        )
    bound = None if budget_gb is None else budget_bytes(budget_gb, memory_bytes)
    return Request(
        bound,
        _policy(policy),
        _scope(scope),
        unit_of(budget_gb),
        effort_for(policy, effort),
        budget_gb.beside_bytes if isinstance(budget_gb, Left) else 0,
    )


def _policy(policy: str | Policy) -> str | Policy:
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise PlanError(f"no policy {policy!r}; there are {', '.join(POLICIES)}")
    elif isinstance(policy, type):
        name = policy.__qualname__
        raise PlanError(f"policy is the class {name}, which makes policies: pass {name}()")
    elif not callable(policy):
        raise PlanError(
            "policy must be a name or a callable (graph, profile, budget_bytes) -> Plan; "
            f"found {type(policy).__name__}"
        )
    return policy


def _scope(scope: str) -> str:
    if scope not in SCOPES:
        raise PlanError(f"no scope {scope!r}; there are {' and '.join(map(repr, SCOPES))}")
    return scope


def effort_for(policy: str | Policy, effort: float | None) -> float | None:
    """The effort, if this policy takes one.

    Raises:
        ArgumentError: it takes none, or not this one.
    """
    if effort is None:
        return None
    if type(policy) in SEARCHES.values():
        raise ArgumentError(
            f"policy {policy!r} has an effort; found effort={effort!r} beside it: give one of them"
        )
    if not isinstance(policy, str) or policy not in SEARCHES:
        what = f"policy {policy!r}" if isinstance(policy, str) else "a policy of your own"
        raise ArgumentError(
            f"effort is for the policies that search ({', '.join(SEARCHES)}), and {what} does not; "
            f"found effort={effort!r}: leave it out"
        )
    return checked_effort(effort)
