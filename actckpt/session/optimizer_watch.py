"""The optimizers of one model: given, or seen to step; what they hold, and what a step takes."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from actckpt.data.graph import Graph
from actckpt.profiler.census import sizes
from actckpt.session.measured_steps import MeasuredSteps
from actckpt.session.optimizers_seen import (
    Accounted,
    SeenOptimizer,
    items_in,
    optimizers_alive,
)
from actckpt.tracing.fake_steps import THROUGH_GRAPH
from actckpt.tracing.optimizing import (
    Optimizing,
    beneath,
    held,
    inner,
    needs_closure,
    outermost,
)

logger = logging.getLogger("actckpt")

# plans for more state, until it is said that it grows
_GROWTHS = 4
# steps of an optimizer that cannot be traced, until what it takes is believed
_MEASURED_STEPS = 3
# state that a step adds, as a share of what it takes for a while: more of it is a first step
_STEADY = 0.01


class OptimizerWatch:
    """Learns the optimizers that step a model's parameters, for as long as it is told of steps."""

    def __init__(self, model: weakref.ref[nn.Module], given: Iterable[Optimizing]) -> None:
        self._model = model
        self._numbers = 0
        self._seen: dict[int, SeenOptimizer] = {}
        # id of what others wrap -> id of the outermost
        self._wrapped: dict[int, int] = {}
        self._others: dict[int, tuple[Any, int]] = {}
        self._last: SeenOptimizer | None = None
        self._measured = MeasuredSteps()
        self._told: set[str] = set()
        self._growths = 0
        self._key: frozenset[Any] | None = None
        # foreseen, and planned without: they do not fit
        self._declined: weakref.WeakSet[Any] = weakref.WeakSet()
        for one in given:
            self._add(one.optimizer, given=True)

    # ---- what a plan is made for

    def current(self) -> tuple[Optimizing, ...]:
        """The optimizers that are alive, each once, and when they step."""
        if self._key is None:
            self._adopt()
        frees = any(s.frees for s in self._seen.values())
        found = (s.optimizing(frees) for s in self._seen.values())
        return tuple(one for one in found if one is not None)

    def key(self) -> frozenset[Any]:
        """What of them a plan depends on."""
        if self._key is None:
            self._adopt()
            frees = any(s.frees for s in self._seen.values())
            self._key = frozenset(s.key(frees) for s in self._seen.values())
        return self._key

    def covered(self, accounted: Accounted) -> bool:
        """Whether a plan that was made for ``accounted`` is one for what is there now."""
        if accounted.optimizers is None:
            return True
        if not self.key() <= accounted.optimizers:
            return False
        size = sum([items_in(o) for seen in self._seen.values() if (o := seen.ref()) is not None])
        if size in accounted.sizes:
            return True
        if self.state_bytes() > accounted.state_bytes and self._grows():
            return False
        accounted.sizes.add(size)
        return True

    def _grows(self) -> bool:
        """Whether to plan again for more state."""
        self._growths += 1
        if self._growths > _GROWTHS:
            names = ", ".join(dict.fromkeys(one.name for one in self.current()))
            self._tell(
                f"what {names} holds has grown {_GROWTHS} times since it was planned for: what it "
                "grows by from now on is not bounded"
            )
        return self._growths <= _GROWTHS

    def state_bytes(self) -> int:
        """Bytes that they hold on the model's device."""
        model = self._model()
        device = next((p.device for p in model.parameters()), None) if model else None
        modules = list(model.modules()) if model is not None else []
        there = (t for one in self.current() for t in held(one.optimizer, modules))
        found = sizes(t for t in there if t.device == device)
        own = sizes(model.parameters()) if model is not None else {}
        return sum(size for address, size in found.items() if address not in own)

    # ---- what is foreseen

    def foresee(self) -> None:
        """Takes optimizers that exist and hold trained parameters for those that will step.

        A loop makes its optimizer before the first forward: planned with it, that forward needs no
        second plan. Where some are known already nothing is foreseen.
        """
        model = self._model()
        if model is None or any(s.ref() is not None for s in self._seen.values()):
            return
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        alive = [x for x in optimizers_alive() if x not in self._declined]
        for optimizer in outermost(alive):
            if optimizer in self._declined or needs_closure(optimizer):
                continue
            if any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
                self._add(optimizer, given=False).foreseen = True

    def decline(self) -> str:
        """Forgets what was foreseen and has not stepped, until it does.

        Returns:
            The names of those optimizers, "" if there are none.
        """
        unseen = {k: s for k, s in self._seen.items() if s.foreseen and not s.steps}
        gone = [x for s in unseen.values() if (x := s.ref()) is not None]
        for optimizer in gone:
            self._declined.add(optimizer)
            for x in inner(optimizer):
                self._wrapped.pop(id(x), None)
        self._seen = {k: s for k, s in self._seen.items() if k not in unseen}
        self._key = None
        return ", ".join(dict.fromkeys(type(x).__name__ for x in gone))

    # ---- what is seen

    def stepped(self, optimizer: Any) -> bool:
        """Notes a step; returns whether the optimizer is one of the model's, and was not known."""
        self._learn_measured(optimizer)
        new = self.know(optimizer)
        seen = self._find(optimizer)
        if seen is not None:
            self._note_when(seen)
            seen.steps += 1
        return new

    def know(self, optimizer: Any) -> bool:
        """Notes an optimizer that exists; returns as `stepped`."""
        if self._find(optimizer) is not None or not self._is_of_model(optimizer):
            return False
        self._add(optimizer, given=False)
        return True

    def _find(self, optimizer: Any) -> SeenOptimizer | None:
        """What is known of an optimizer, or of the one that wraps it."""
        outer = self._wrapped.get(id(optimizer), id(optimizer))
        seen = self._seen.get(outer)
        found = seen.ref() if seen is not None else None
        # an id may be another's by now
        known = found is not None and (found is optimizer or outer != id(optimizer))
        return seen if known else None

    def _is_of_model(self, optimizer: Any) -> bool:
        groups = optimizer.param_groups
        other = self._others.get(id(optimizer))
        if other is not None and other[0]() is optimizer and other[1] == len(groups):
            return False
        model = self._model()
        own = {id(p) for p in model.parameters()} if model is not None else set()
        steps = any(id(p) in own for group in groups for p in group["params"])
        if steps and not needs_closure(optimizer):
            return True
        if steps:
            self._tell(
                f"{type(optimizer).__name__} runs the model in its step: what it takes is not "
                "bounded"
            )
        self._others[id(optimizer)] = (weakref.ref(optimizer), len(groups))
        return False

    def _add(self, optimizer: Any, *, given: bool) -> SeenOptimizer:
        optimizer = beneath(optimizer)
        self._wrapped.pop(id(optimizer), None)
        self._seen = {key: s for key, s in self._seen.items() if s.ref() is not None}
        found = self._seen[id(optimizer)] = SeenOptimizer(self._numbers, optimizer, given=given)
        self._numbers += 1
        for x in inner(optimizer):
            self._wrapped[id(x)] = id(optimizer)
            earlier = self._seen.pop(id(x), None)
            if earlier is not None:
                found.steps, found.in_backward = earlier.steps, earlier.in_backward
                found.frees = earlier.frees
        self._key = None
        return found

    def _note_when(self, seen: SeenOptimizer) -> None:
        """Whether it steps inside backward, and whether the one before has freed its gradients."""
        inside = torch._C._current_graph_task_id() != -1
        in_backward = inside and (seen.in_backward or not seen.steps)
        if in_backward != seen.in_backward:
            seen.in_backward = in_backward
            self._key = None
        last, self._last = self._last, seen if inside else None
        if not inside or last is None or last is seen or last.frees is not None:
            return
        optimizer = last.ref()
        if optimizer is not None:
            groups = optimizer.param_groups
            last.frees = all(p.grad is None for group in groups for p in group["params"])
            self._key = None

    def gradients_stay(self) -> None:
        """Some are there when a forward begins: not every backward steps and frees those.

        So it is where gradients are accumulated over several backwards before a step.
        """
        for seen in self._seen.values():
            optimizer = seen.ref() if seen.in_backward and seen.frees is not False else None
            groups = optimizer.param_groups if optimizer is not None else ()
            if any(p.grad is not None for group in groups for p in group["params"]):
                seen.frees = False
                self._key = None

    def _adopt(self) -> None:
        """Puts wrappers in the place of what they wrap: their own copies of the weights count.

        Nobody tells of those that are none of torch's kind, or step their optimizer themselves.
        """
        learned = [s for s in self._seen.values() if s.given is None and s.ref() is not None]
        if not learned:
            return
        known = {id(s.ref()) for s in self._seen.values()}
        wrappers = [x for x in optimizers_alive() if known & {id(i) for i in inner(x)}]
        for optimizer in outermost(wrappers):
            if id(optimizer) not in known:
                self._add(optimizer, given=False)

    # ---- steps that cannot be traced

    def untraced(self, graph: Graph, optimizers: tuple[Optimizing, ...]) -> None:
        """Their next steps are measured, as a graph that was traced with them says."""
        for number, why in graph.untraced_optimizers:
            one = optimizers[number]
            seen = self._seen.get(id(one.optimizer))
            if seen is None or seen.temporary_bytes is not None:
                continue
            if seen.told:
                continue  # of another line of the same step
            seen.told = True
            if THROUGH_GRAPH in why:
                self._tell(f"{why}: what is kept and made for that is not bounded")
                continue
            self._tell(
                f"{why}: that step cannot be planned ahead. What it takes is measured when it is "
                "made, and planned for from then on" + self._resets()
            )
            self._measured.want((one.optimizer, *inner(one.optimizer)))
        self._measured.listen()

    def _resets(self) -> str:
        model = self._model()
        cuda = model is not None and any(p.is_cuda for p in model.parameters())
        return " (which resets the allocator's peak statistics once)" if cuda else ""

    def before_step(self, optimizer: Any) -> None:
        """Begins to measure, if the optimizer's step is one to be measured."""
        self._measured.begin(optimizer)

    def _learn_measured(self, optimizer: Any) -> None:
        """A step has ended: what it took, if it was measured, is believed once it is steady."""
        meter, seen = self._measured.end(optimizer), self._find(optimizer)
        if meter is None or seen is None:
            return
        seen.tries += 1
        steady = meter.end_bytes <= max(_STEADY * meter.peak_bytes, 4096)
        if steady or seen.tries == _MEASURED_STEPS:
            seen.temporary_bytes = meter.peak_bytes
            self._measured.enough((optimizer, *inner(optimizer), seen.ref()))
            self._key = None

    def abandon_meter(self) -> None:
        """Ends a measurement, which an error in the step may have left open."""
        self._measured.abandon()

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning("actckpt: %s", message)


def tell_untraced(graph: Graph) -> None:
    """One line for each optimizer that a graph leaves out."""
    for _, why in graph.untraced_optimizers:
        logger.warning("actckpt: %s: that step cannot be traced, and is left out", why)
