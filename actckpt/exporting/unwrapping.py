"""What a model was wrapped in, taken off its names and off the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from actckpt.errors import WeightsExportError

# no model calls a part of its own so: of torch.compile, FSDP, and torch's checkpoint wrapper
_ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# of DataParallel, DistributedDataParallel and averages; a model may have a part of this name
_OUTERMOST = "module."
_AVERAGES_COUNT = "n_averaged"


def own_state(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What an unwrapped model has, without the names that wrap parts of it.

    Raises:
        WeightsExportError: two names would become one.
    """
    bare = {_without(name): x for name, x in state.items()}
    if len(bare) != len(state):
        raise WeightsExportError(
            f"{where} has names that differ only by what torch.compile or FSDP add to them: "
            "export the model inside"
        )
    return bare


def unwrapped_state(
    state: Mapping[str, Any], where: str, own: Collection[str] = ()
) -> dict[str, Any]:
    """A saved state under the names that the bare model has; without the count of an average.

    Args:
        own: names of the bare model, where it is known: a part of its own may be called as a
            wrapper calls what it wraps.

    Raises:
        WeightsExportError: two names would become one.
    """
    bare = own_state(state, where)
    while rest := [name for name in bare if name != _AVERAGES_COUNT]:
        if not bare.keys().isdisjoint(own) or not all(n.startswith(_OUTERMOST) for n in rest):
            break
        bare = {name.removeprefix(_OUTERMOST): bare[name] for name in rest}
    return bare


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, data parallel wrappers and torch's averages."""
    from torch._dynamo.eval_frame import OptimizedModule
    from torch.nn.parallel import DataParallel, DistributedDataParallel
    from torch.optim.swa_utils import AveragedModel

    while True:
        inner: Any
        if isinstance(model, OptimizedModule):
            inner = model._orig_mod
        elif isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
            inner = model.module
        else:
            return model
        model = inner


def _without(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _ANYWHERE)
