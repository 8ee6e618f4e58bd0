"""What is in a model: looked at before every forward, and walked through only once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn

# in C: a forward of small layers asks for thousands of these
_children: Callable[[nn.Module], dict[str, nn.Module | None]] = attrgetter("_modules")
_grad: Callable[[nn.Parameter], torch.Tensor | None] = attrgetter("grad")
_is_leaf: Callable[[nn.Parameter], bool] = attrgetter("is_leaf")


class Contents(NamedTuple):
    """The modules of a model, each once, and their parameters, as often as modules hold them."""

    modules: list[nn.Module]
    parameters: list[nn.Parameter]

    def are_computed(self) -> bool:
        """Whether there is a parameter with a graph, as `torch.func.functional_call` puts there."""
        return not all(map(_is_leaf, self.parameters))

    def has_gradients(self, computed: bool) -> bool:
        """Whether there is a gradient of a parameter that is none of the ``computed``, if any."""
        found = self.parameters
        if computed:
            found = [p for p in found if p.is_leaf]
        return not all(map(is_, map(_grad, found), repeat(None)))


class ModelContents:
    """The contents of one model as they are now.

    Modules are walked through again only where one was put in, taken out or replaced. It keeps none
    of them alive, nor the tables that they stand in: whoever holds this is held by the model.
    """

    def __init__(self, model: weakref.ref[nn.Module]) -> None:
        self._model = model
        self._modules: list[weakref.ref[nn.Module]] = []
        self._tables: list[dict[str, nn.Parameter | None]] = []
        self._of_children: Callable[[list[nn.Module | None]], Sequence[nn.Module | None]] = tuple

    def now(self) -> Contents:
        """What is in the model."""
        modules = [m for ref in self._modules if (m := ref()) is not None]
        if not modules or not self._is_still(modules):
            modules = self._walk()
        parameters = [p for t in self._tables if t for p in t.values() if p is not None]
        return Contents(modules, parameters)

    def _is_still(self, modules: list[nn.Module]) -> bool:
        """Whether each module of the last walk has the children that it had."""
        if len(modules) < len(self._modules):
            return False
        now = [m for t in map(_children, modules) if t for m in t.values()]
        known = self._of_children([*modules, None])
        return len(now) == len(known) and all(map(is_, now, known))

    def _walk(self) -> list[nn.Module]:
        model = self._model()
        assert model is not None  # its forward begins
        modules = [model]
        numbers = {id(model): 0}
        children: list[nn.Module | None] = []
        for module in modules:  # which grows
            for child in module._modules.values():
                children.append(child)
                if child is not None and id(child) not in numbers:
                    numbers[id(child)] = len(modules)
                    modules.append(child)
        self._modules = [weakref.ref(m) for m in modules]
        self._tables = [m._parameters for m in modules]
        # each child by its number; what is None stands behind the modules
        self._of_children = _picker([numbers.get(id(c), len(modules)) for c in children])
        return modules


def _picker(places: list[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Picks what stands at these places of a list."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda found: [found[n] for n in places]
