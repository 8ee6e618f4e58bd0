"""An order drawn again on copies of the samplers, before the run goes on: is it the same?

A library's samplers draw the same again from the same generators. Whether those of the user's own
do is tried when a run is resumed, on copies, and nothing of the run moves.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from actckpt.resuming.generators import generators_of
from actckpt.resuming.loaders import index_sampler_name, samplers_of, workers_of
from actckpt.resuming.order import Order
from actckpt.resuming.passes import put_sampler_epochs
from actckpt.resuming.random_states import gather_random_states, put_random_states
from actckpt.resuming.sampler_states import SamplerStates


def rehearsed(source: Any, samplers: SamplerStates, state: dict[str, Any]) -> str:
    """Why the order that follows may be another; or "".

    Args:
        state: of a `DataPosition`.
    """
    if not samplers.samplers:
        return ""
    names = ", ".join(sorted({type(s).__qualname__ for s in samplers.samplers.values()}))
    begin = state.get("start") or state.get("between") or {}
    if "samplers" not in begin:
        return f"what {names} draws from or keeps, if anything, was not saved"
    generators, random = generators_of({"loader": source}), gather_random_states()
    now = generators.states()
    try:
        generators.put(begin.get("drawn", {}))
        return _tried(source, state, begin, names)
    except Exception as error:  # code of the user's own
        return f"what {names} draws cannot be compared: {type(error).__name__}: {error!s:.120}"
    finally:
        generators.put(now)
        put_random_states(random)


def _tried(source: Any, state: dict[str, Any], begin: dict[str, Any], names: str) -> str:
    twin = _copied(source)
    copies = SamplerStates(twin)
    copies.put(begin["samplers"])
    if found := copies.different(begin["samplers"]):
        return f"{found[0]} is another than it was, and was not put back"
    if not state["batch"]:
        return ""
    put_random_states({k: v for k, v in begin["random"].items() if k != "cuda"})
    put_sampler_epochs(twin, begin)
    order = _drawn(source, twin, state["digest"]["drawn"], begin["reused"])
    order.take(state["digest"]["taken"])
    saved = state["digest"]
    if (order.text, order.last) != (saved["text"], saved["last"]):
        return (
            f"{names} draws another order than it did: from something that no checkpoint holds, "
            "or from what training draws from at the same time"
        )
    copies.put(state["samplers"])
    if found := copies.different(state["samplers"]):
        return f"{found[0]} is another than it was, and was not put back"
    return ""


def _copied(source: Any) -> types.SimpleNamespace:
    """The loader's samplers, copied; the data that they look at is not."""
    shared = [source.dataset]
    for sampler in samplers_of(source):
        values = getattr(sampler, "__dict__", {}).values()
        shared += [
            v
            for v in values
            if isinstance(v, types.ModuleType | Dataset | DataLoader | torch.nn.Module)
        ]
    memo = {id(x): x for x in shared}
    names = ("sampler", "batch_sampler")
    return types.SimpleNamespace(**{n: copy.deepcopy(getattr(source, n), memo) for n in names})


def _drawn(source: Any, twin: Any, count: int, reused: bool) -> Order:
    """The order of so many draws, drawn as a loader does."""
    sampler = getattr(twin, index_sampler_name(source))
    iterator = iter(sampler)
    if not reused:
        torch.empty((), dtype=torch.int64).random_(generator=source.generator)
        if workers_of(source):
            iterator = iter(sampler)  # a loader with workers begins twice
    order = Order()
    for _ in range(count):
        order.draw(next(iterator))
    return order
