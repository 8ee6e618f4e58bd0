"""Whether the forward of a plan is what the loop runs; where it is not, that is said once.

It is known when an optimizer has stepped, of the model or of what seems to be a copy of it.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from actckpt.errors import PlanError
from actckpt.rewriting.patch import patch_of
from actckpt.session.optimizer_listeners import listen
from actckpt.tracing.forwards import described

logger = logging.getLogger("actckpt")


class Watched(Protocol):
    """A session, as it is seen here."""

    @property
    def entries_waited_for(self) -> tuple[str, ...]: ...

    @property
    def has_plan(self) -> bool: ...

    def begin_again(self) -> None: ...


Anew = Callable[[nn.Module], None]


class Use:
    """What is known of the use of one model's plan.

    Attributes:
        forwards: how many of them the plan was asked for, with gradients.
    """

    def __init__(self, session: Watched, anew: Anew, *, copied: bool) -> None:
        # weakly: its loss may hold the model, which would then never go
        self._session = weakref.ref(session)
        self._anew = anew
        self._names = session.entries_waited_for
        self.copied = copied
        self.forwards = 0
        # optimizers of this model, with the count at their last step; of others
        self._own: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._others: weakref.WeakSet[Any] = weakref.WeakSet()
        self._told = False
        # what stood in the place of the forward when it was last seen to run
        self._stood: tuple[int, ...] = ()

    def stepped(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped: looks whether the forward ran before."""
        if optimizer in self._others:
            return
        before = self._own.get(optimizer)
        if before is None and not trains(optimizer, model):
            self._others.add(optimizer)
            self._note_copy(model, optimizer)
            return
        self._own[optimizer] = self.forwards
        session = self._session()
        if session is not None:
            self._names = session.entries_waited_for
        names = self._names
        stood = tuple(id(model.__dict__.get(name)) for name in names)
        if self.forwards > (before or 0):
            self._stood = stood
            return
        if self._told or (before is not None and stood == self._stood):
            return
        there = _in_place(model, names)
        if there:
            self._told = True
            logger.warning(
                "actckpt: the step just made was without a plan: %s stands in the place of the %s "
                "of the %s since actckpt.optimize, and has not called it. The next step is planned "
                "for what stands there now. To plan from the first: call actckpt.optimize after "
                "what puts it there (a trainer's constructor)",
                there,
                " or ".join(names),
                type(model).__name__,
            )
            if session is not None:
                session.begin_again()
            else:
                self._anew(model)
        elif not self.forwards:
            self._told = True
            waits = session is not None and not session.has_plan
            planned = "nothing is planned" if waits else "the plan was not used"
            logger.warning(
                "actckpt: an optimizer has stepped, but the %s of the %s was never called with "
                "gradients: %s. Optimize the module that the loop calls: this one's other methods, "
                "a module inside it, a copy of it are not bounded by its plan",
                " or ".join(names),
                type(model).__name__,
                planned,
            )

    def _note_copy(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """What steps looks like this model and is not: perhaps a copy is trained in its place."""
        if self._told or self.forwards or self.copied or _trains_a_watched_one(optimizer):
            return
        shapes = Counter(p.shape for p in model.parameters() if p.requires_grad)
        if Counter(p.shape for p in _stepped_by(optimizer)) != shapes:
            return
        self._told = True
        logger.warning(
            "actckpt: an optimizer of other parameters of the same shapes has stepped, and the %s "
            "that was optimized was not called yet. If a copy of it made before is trained in its "
            "place, that one has no plan: call actckpt.optimize on it",
            type(model).__name__,
        )


_USES: weakref.WeakKeyDictionary[nn.Module, Use] = weakref.WeakKeyDictionary()


def watch(model: nn.Module, session: Watched, anew: Anew, *, copied: bool = False) -> Use:
    """Begins to look whether the plans of this model are used, in place of any earlier ones.

    Args:
        anew: optimizes the model as before, where nobody has the session any more; without what
            holds the model.
    """
    listen(_LOOKS)  # after the session, which may plan for the optimizer
    use = _USES[model] = Use(session, anew, copied=copied)
    return use


def forget(model: nn.Module) -> None:
    """The model has no plan any more, and none is missed."""
    _USES.pop(model, None)


def trains(optimizer: Any, model: nn.Module) -> bool:
    """Whether an optimizer steps any of the model's parameters."""
    own = {id(p) for p in model.parameters()}
    return any(id(p) in own for p in _stepped_by(optimizer))


def refuse_strange(optimizer: Any, model: nn.Module) -> None:
    """Refuses an optimizer that has nothing to do with the model.

    Raises:
        PlanError: it steps parameters, and none of the model's.
    """
    if optimizer is not None and _stepped_by(optimizer) and not trains(optimizer, model):
        raise PlanError(
            f"the {type(optimizer).__name__} given as optimizer steps none of the parameters of "
            f"the {type(model).__name__}: pass the one that trains this model. (A copy of the "
            "model, or one whose parameters were made anew since, is another model to it.)"
        )


def _stepped_by(optimizer: Any) -> list[torch.Tensor]:
    several = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    return [p for one in several for group in one.param_groups for p in group["params"]]


def _trains_a_watched_one(optimizer: torch.optim.Optimizer) -> bool:
    return any(trains(optimizer, model) for model in list(_USES))


def _in_place(model: nn.Module, names: tuple[str, ...]) -> str:
    """What stands in the place of ours, calling it or not; "" where nothing does."""
    for name in names:
        there, ours = model.__dict__.get(name), patch_of(model, model, name)
        if there is not ours or there is None:
            return described(getattr(type(model), name) if there is None else there)
    return ""


class _Looks:
    """Told of the steps of all optimizers: looks at the use of every watched model."""

    def before_step(self, optimizer: Any) -> None:
        pass

    def after_step(self, optimizer: Any) -> None:
        for ref in _USES.keyrefs():
            model = ref()
            if model is not None and (use := _USES.get(model)) is not None:
                use.stepped(model, optimizer)


_LOOKS = _Looks()
