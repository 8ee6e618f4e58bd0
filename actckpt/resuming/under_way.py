"""What of a training step is under way when a state is saved: then it is between no two steps."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from actckpt.resuming.parameter_names import named_parameters
from actckpt.resuming.reachable import reachable

# parameters whose gradients and versions tell for all
_SAMPLED = 8
# searches for optimizers within what was passed: there may be one for every parameter
_LOOKS = 3

logger = logging.getLogger("actckpt")


class UnderWay:
    """Batches handed out and optimizers that stepped since the last step that was counted.

    Args:
        objects: what the run was given, by item.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = objects
        passed = [x for x in objects.values() if isinstance(x, torch.optim.Optimizer)]
        trained = [p for _, p in named_parameters(objects) if p.requires_grad]
        self._sample = trained[:: max(1, len(trained) // _SAMPLED)][:_SAMPLED]
        # what an optimizer that is not the library's is to this run: "" is nothing
        self._known: weakref.WeakKeyDictionary[torch.optim.Optimizer, str]
        self._known = weakref.WeakKeyDictionary(dict.fromkeys(passed, _PASSED))
        self._strangers: dict[str, None] = {}
        self._inner: set[int] = set()
        self._looked = 0
        self._foreign = any(map(_is_foreign, objects.values()))
        # names of objects that moved between a step's count and the next batch
        self._late: dict[str, None] = {}
        # of all steps so far, the batches that one was made of; 0 where there was none yet
        self._most = 0
        self.begin()

    def begin(self) -> None:
        """The state is one between two steps."""
        self._batches = 0
        self._in_hand = False
        self._gradients: list[Any] = []
        self._stepping = ""
        self._stepped = ""
        self._versions = [p._version for p in self._sample] if self in _WATCHING else []
        self._moved: dict[str, Any] = {}

    def handed_out(self, *, first: bool) -> None:
        """A batch was, which belongs to the next step.

        Args:
            first: of an epoch, before which a schedule may move.
        """
        if self._moved and not first:
            self._notice_late()
        self._moved = {}
        self._batches += 1
        self._in_hand = True
        self._gradients = self._seen_gradients()

    def asked_on(self) -> None:
        """The loop has done with the last batch what it does."""
        self._in_hand = False

    def counted(self) -> None:
        """A step was."""
        self._most = max(self._most, self._batches)
        self.begin()
        self._moved = self._places()

    def reasons(self) -> list[str]:
        """Why a run that goes on from the state as it is may be another; none between two steps."""
        found = [
            f"{name} steps on these parameters and was not passed: its state is in no checkpoint"
            for name in self._strangers
        ]
        found += [
            f"the {name} moves on after run.step(), which saves it as it was before: call "
            "run.step() last"
            for name in self._late
        ]
        if self._stepping:
            found.append(
                f"saved while {self._stepping}.step() was under way: some parameters may have "
                "been changed, and others not"
            )
        elif self._stepped or self._was_changed():
            what = f"{self._stepped} had stepped" if self._stepped else "parameters were changed"
            found.append(f"saved after {what} and before run.step() counted it")
        elif self._in_hand and (why := self._of_batch()):
            found.append(f"saved {why}: a resumed run goes on with the next batch")
        return found

    def item(self) -> dict[str, Any]:
        """What of it a checkpoint holds."""
        return {"reasons": self.reasons(), "batches": self._batches, "most": self._most}

    def put(self, item: Mapping[str, Any] | None) -> list[str]:
        """Takes what `item` gave, and returns its reasons; None is of an earlier version."""
        self.begin()
        if item is None:
            return []
        self._batches, self._most = item["batches"], max(item["most"], self._most)
        return list(item["reasons"])

    # ---- what is seen

    def _of_batch(self) -> str:
        """What is wrong with saving while a batch is in the loop's hand; "" if nothing."""
        error = sys.exception()
        if error is not None:
            return f"while a {type(error).__name__} was handled, with a batch in hand"
        if self._batches >= self._most > 0:
            return "with a batch in hand, before run.step() counted the step on it"
        if self._gradients == self._seen_gradients():
            return "with a batch in hand that no gradient was made of"
        if not self._most:
            return "with a batch in hand, before the first step showed how many make one"
        return ""

    def _seen_gradients(self) -> list[Any]:
        """What changes with every backward pass."""
        return [None if (g := p.grad) is None else (id(g), g._version) for p in self._sample]

    def _was_changed(self) -> bool:
        """Whether an optimizer that has no hooks may have stepped."""
        if not self._foreign or not self._versions:
            return False
        return self._versions != [p._version for p in self._sample]

    def _places(self) -> dict[str, Any]:
        """How far what moves once a step has come."""
        found = {}
        for name, x in self._objects.items():
            if isinstance(x, torch.optim.lr_scheduler.LRScheduler):
                found[name] = getattr(x, "last_epoch", None)
            elif isinstance(count := getattr(x, "n_averaged", None), torch.Tensor):
                found[name] = count._version
        return found

    def _notice_late(self) -> None:
        for name, place in self._places().items():
            if place != self._moved.get(name, place) and name not in self._late:
                self._late[name] = None
                logger.warning(
                    "actckpt: the %s moves on after run.step(), so that checkpoints hold it as it "
                    "was before, and are not resumed bit for bit: call run.step() last",
                    name,
                )

    def watch(self) -> None:
        """From now on the steps of optimizers are seen."""
        if self in _WATCHING:
            return
        _WATCHING.add(self)
        self._versions = [p._version for p in self._sample]
        if not _HANDLES:
            _HANDLES.append(register_optimizer_step_pre_hook(_before))
            _HANDLES.append(register_optimizer_step_post_hook(_after))

    def unwatch(self) -> None:
        """Looks no longer."""
        _WATCHING.discard(self)
        _let_go()

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """One is about to step."""
        if self._concerns(optimizer):
            self._stepping = type(optimizer).__name__

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """One has."""
        if self._concerns(optimizer):
            self._stepping, self._stepped = "", type(optimizer).__name__

    def _concerns(self, optimizer: torch.optim.Optimizer) -> bool:
        what = self._known.get(optimizer)
        if what is None:
            what = self._known[optimizer] = self._what_is(optimizer)
            if what == _STRANGER:
                self._strangers[type(optimizer).__name__] = None
        return bool(what)

    def _what_is(self, optimizer: torch.optim.Optimizer) -> str:
        own = {id(p) for _, p in named_parameters(self._objects)}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            return ""
        # a wrapper that was passed may hold the one that steps
        if id(optimizer) not in self._inner and self._looked < _LOOKS:
            self._looked += 1
            found = (x for _, x in reachable(self._objects))
            self._inner = {id(x) for x in found if isinstance(x, torch.optim.Optimizer)}
        return _PASSED if id(optimizer) in self._inner else _STRANGER


_PASSED, _STRANGER = "passed", "stranger"
_WATCHING: weakref.WeakSet[UnderWay] = weakref.WeakSet()
_HANDLES: list[RemovableHandle] = []


def _is_foreign(x: Any) -> bool:
    """Whether it is an optimizer, and none of torch's, whose steps nobody tells."""
    return hasattr(x, "param_groups") and not isinstance(x, torch.optim.Optimizer)


def _before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        for each in list(_WATCHING):
            each.before(optimizer)


def _after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        for each in list(_WATCHING):
            each.after(optimizer)
        _let_go()


def _let_go() -> None:
    """Hooks stay no longer than there is a run that looks."""
    if not _WATCHING:
        while _HANDLES:
            _HANDLES.pop().remove()
