"""The plans of a session as JSON data, for another process that trains the same model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.errors import PlanError
from actckpt.planning.request import Recalled, Request, effort_in_force
from actckpt.tracing.backwards import Backward


@dataclass(frozen=True, slots=True)
class KeptPlans:
    """Plans, and what was learned of the steps that they are for.

    Attributes:
        backwards: those that steps run over one graph.
        changes: forwards change from step to step.
    """

    plans: tuple[Recalled, ...]
    backwards: tuple[Backward, ...]
    changes: bool

    def to_json(self, request: Request) -> dict[str, Any]:
        """Plain JSON data, with what the plans were asked for; `from_json` reads it back equal."""
        return {
            **_asked(request),
            "changes": self.changes,
            "backwards": [b.to_json() for b in self.backwards],
            "plans": [
                {"key": r.key, "plan": r.plan.to_json(), "profile": r.profile.to_json()}
                for r in self.plans
            ],
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> KeptPlans:
        """What `to_json` wrote.

        Raises:
            PlanError: the state is none of a session.
        """
        try:
            return cls(
                tuple(
                    Recalled(p["key"], Plan.from_json(p["plan"]), Profile.from_json(p["profile"]))
                    for p in state["plans"]
                ),
                tuple(Backward.from_json(b) for b in state.get("backwards", ())),
                bool(state.get("changes")),
            )
        except (KeyError, TypeError) as error:
            raise PlanError(f"not the plans of a session: {error!r}") from error


def asked_otherwise(state: dict[str, Any], request: Request) -> str:
    """In what the request that plans were kept for differs from this one; "" if in nothing."""
    were = {**state, "effort": effort_in_force(state.get("policy"), state.get("effort"))}
    for name, mine in _asked(request).items():
        if were.get(name) != mine:
            return f"{name} was {were.get(name)!r} and is now {mine!r}"
    return ""


def _asked(request: Request) -> dict[str, Any]:
    return {
        "budget_bytes": request.budget_bytes,
        "policy": request.policy_name,
        "scope": request.scope,
        "effort": effort_in_force(request.policy_name, request.effort),
    }
