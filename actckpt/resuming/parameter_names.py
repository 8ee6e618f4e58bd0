"""What the parameters of an optimizer are called, over everything that a run was given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


class ParameterNames:
    """The names of the tensors that some objects hold.

    Those of the model are plain, those of other objects begin with their item: ``extra-critic:``.

    Args:
        objects: by item; the model is ``model``. Optimizers hold no parameter themselves.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        # the tensors of their states; only looked at where a parameter is in no module
        self._by_window: dict[tuple[Any, ...], str] | None = None
        self._by_id = {id(p): name for name, p in named_parameters(objects)}
        named = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
        self._others = {n: x for n, x in objects.items() if not isinstance(x, named)}

    def of(self, parameter: torch.Tensor) -> str:
        """The name of a parameter; "" where none of the objects holds it."""
        name = self._by_id.get(id(parameter))
        if name is not None or not _is_plain(parameter):
            return name or ""
        if self._by_window is None:
            self._by_window = {
                _window(tensor): f"{item}:{key}"
                for item, x in self._others.items()
                for key, tensor in _tensors(x.state_dict())
            }
        return self._by_window.get(_window(parameter), "")


def named_parameters(objects: Mapping[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every module among these objects, the model's first; each once."""
    seen: set[int] = set()
    for item, x in sorted(objects.items(), key=lambda entry: entry[0] != "model"):
        if isinstance(x, nn.Module):
            for name, parameter in x.named_parameters():
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                yield (name if item == "model" else f"{item}:{name}"), parameter


def _is_plain(x: torch.Tensor) -> bool:
    return type(x) in (torch.Tensor, nn.Parameter) and x.layout == torch.strided


def _window(x: torch.Tensor) -> tuple[Any, ...]:
    """What tells that two tensors are the same numbers in memory."""
    return x.device, x.data_ptr(), x.shape, x.stride()


def _tensors(state: Any, key: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        if _is_plain(state):
            yield key, state
    elif isinstance(state, Mapping):
        for name, value in state.items():
            yield from _tensors(value, f"{key}/{name}" if key else str(name))
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from _tensors(value, f"{key}/{index}" if key else str(index))
