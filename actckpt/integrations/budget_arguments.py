"""What the MemoryBudgets of all trainers are given, and what they have found."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

from torch import nn

import actckpt
from actckpt import Checkpointer, PlanError, Report, Resumed
from actckpt.asked import request_of
from actckpt.checkpoint.local_path import local_path, refuse_file
from actckpt.checkpoint.retention import Keep
from actckpt.errors import ArgumentError
from actckpt.integrations.replicas import bucket_bytes, budget_left, planned_in
from actckpt.resuming.cadence import Cadence
from actckpt.resuming.live_objects import Stateful
from actckpt.session.session import Session, session_of


class Settings(TypedDict, total=False):
    """What `BudgetArguments` takes by name."""

    checkpoints: str | os.PathLike[str] | None
    every: int | str | None
    keep_last: int | None
    keep_best: tuple[str, str, int] | None
    fresh: bool
    extra: Mapping[str, Stateful] | None
    policy: Any
    scope: str


class BudgetArguments:
    """The arguments, checked when they are given; the report and the run that come of them.

    Args:
        budget_gb: as for `actckpt.optimize`. None with a policy of another name than "auto" applies
            that without a bound, and with "auto" only keeps checkpoints.
        checkpoints: a directory of this run alone, made if it does not exist. None keeps none, and
            then the next five say nothing.
        every: of optimizer steps, a duration, "auto" or None; as for `actckpt.Checkpointer`.
        keep_last: how many of the newest stay; None keeps all.
        keep_best: (metric, "min" or "max", how many) that stay besides.
        fresh: begins anew where another run's checkpoints are.
        extra: what else is part of the run, by name, with ``state_dict`` and ``load_state_dict``: a
            teacher that follows the model, a memory bank.
        policy: as for `actckpt.optimize`.
        scope: as for `actckpt.optimize`.

    Attributes:
        run: the `actckpt.Checkpointer`, while and after the trainer trains; None without
            ``checkpoints``.
        resumed: what resuming found; None where the run began anew.

    Raises:
        BudgetError, PlanError, ArgumentError: an argument is not what it must be; or there is
            nothing to do.
    """

    _begins: ClassVar[str]  # by what training begins, for messages

    def __init__(
        self,
        budget_gb: float | str | None,
        *,
        checkpoints: str | os.PathLike[str] | None = None,
        every: int | str | None = "auto",
        keep_last: int | None = 3,
        keep_best: tuple[str, str, int] | None = None,
        fresh: bool = False,
        extra: Mapping[str, Stateful] | None = None,
        policy: Any = "auto",
        scope: str = "step",
    ) -> None:
        self._plans = budget_gb is not None or policy != "auto"
        if self._plans:
            request_of(budget_gb, policy, scope, lambda: 10**9)  # of whatever device
        elif checkpoints is None:
            raise PlanError("there is nothing to do: give a budget, such as '8GB', or checkpoints=")
        if checkpoints is not None:
            if not isinstance(checkpoints, str | os.PathLike):
                raise ArgumentError(f"checkpoints must be a directory; found {checkpoints!r:.60}")
            refuse_file(local_path(checkpoints).absolute())
        if Cadence(every).by_epoch:
            raise ArgumentError(
                "every='epoch' is for loops over run.steps(...). Under a trainer pass the steps of "
                "an epoch: every=len(loader) where each batch is one"
            )
        Keep(keep_last, keep_best)
        self._planning: dict[str, Any] = {"budget_gb": budget_gb, "policy": policy, "scope": scope}
        self._checkpoints = checkpoints
        self._extra = dict(extra or {})
        self._keeping: dict[str, Any] = {
            "every": every,
            "keep_last": keep_last,
            "keep_best": keep_best,
            "fresh": fresh,
        }
        self._model: nn.Module | None = None
        self._session: Session | None = None
        self._last: Session | None = None
        self.run: Checkpointer | None = None
        self.resumed: Resumed | None = None

    @property
    def report(self) -> Report:
        """The report of the plan for the largest batch, also when training has ended.

        Raises:
            PlanError: no training step was planned yet.
        """
        session = self._session if self._has_planned() else self._last
        if session is None:
            why = f"report is there once {self._begins} runs"
            if not self._plans:
                why = "without a budget nothing is, checkpoints are kept alone"
            raise PlanError(f"nothing was planned yet: {why}")
        return session.report_of_largest()

    def _has_planned(self) -> bool:
        """Whether a step was, in the training that runs."""
        return self._session is not None and self._session.current is not None

    def _optimize(
        self,
        model: nn.Module,
        optimizer: Any,
        accumulate: bool,
        beside: Mapping[str, int] | None = None,
    ) -> None:
        """Plans from now on, where that was asked for.

        Args:
            model: as it is called, in DistributedDataParallel or not.
            beside: bytes of what else lies on its device, by a name for messages.
        """
        if not self._plans:
            return
        given, inner = dict(self._planning), planned_in(model)
        if given["scope"] == "step":
            others = {**(beside or {}), **bucket_bytes(model)}
            given["budget_gb"] = budget_left(given["budget_gb"], inner, others)
        actckpt.optimize(inner, optimizer=optimizer, accumulate=accumulate, **given)
        self._model, self._session = inner, session_of(inner)

    def _revert(self) -> None:
        """The model is as it was; its report can still be asked for, which takes a while."""
        if self._has_planned():
            self._last = self._session
        model, self._model, self._session = self._model, None, None
        if model is not None:
            actckpt.revert(model)

    def _checkpointer(
        self, own: Mapping[str, Stateful] | None = None, **objects: Any
    ) -> Checkpointer | None:
        """The run that keeps checkpoints of these; None where that was not asked for.

        Args:
            own: what the trainer keeps, beside what the user has given.
        """
        self.run = None
        if self._checkpoints is not None:
            own = own or {}
            if taken := sorted(self._extra.keys() & own.keys()):
                raise ArgumentError(
                    f"extra={{{taken[0]!r}: ...}}: what the trainer keeps has that name; give "
                    "another"
                )
            extra = {**self._extra, **own}
            self.run = Checkpointer(self._checkpoints, extra=extra, **objects, **self._keeping)
        return self.run
