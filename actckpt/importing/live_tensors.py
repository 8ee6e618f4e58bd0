"""The tensors of a model that weights can be written into, and how: all of them, or none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parameter import is_lazy

from actckpt.errors import ArgumentError, CheckpointMismatchError


def live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by their names in the state dict, tied ones by each.

    Raises:
        ArgumentError: it is no module, or has tensors that nothing can be copied into.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module; found {type(model).__name__}")
    own = {id(x) for x in (*model.parameters(), *model.buffers())}
    found = {
        name: x
        for name, x in model.state_dict(keep_vars=True).items()
        if isinstance(x, torch.Tensor) and id(x) in own
    }
    for name, x in found.items():
        if reason := _unwritable(x):
            raise ArgumentError(f"{name} of the model {reason}. Nothing was changed")
    return found


def _unwritable(x: torch.Tensor) -> str:
    if is_lazy(x):
        return "has no shape yet: run one batch through the model first"
    if x.is_meta:
        return 'is on the meta device: model.to_empty(device="cpu") first'
    if x.is_inference():
        return "was made in inference mode, and cannot be changed: build the model outside of it"
    if type(x) not in (torch.Tensor, nn.Parameter, nn.Buffer) and not isinstance(x, DTensor):
        return f"is a {type(x).__name__}: load the weights first, and quantize or wrap them then"
    if any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True)):
        return "has elements that are one number (expand): give it its own by contiguous() first"
    return ""


def groups_of(live: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """The names of each tensor, or window on the same numbers, in order."""
    found: dict[object, list[str]] = {}
    for name, x in live.items():
        found.setdefault(_identity(x), []).append(name)
    return [tuple(names) for names in found.values()]


def _identity(x: torch.Tensor) -> object:
    if isinstance(x, DTensor) or not x.numel():
        return id(x)
    return x.device, x.data_ptr(), x.shape, x.stride(), x.dtype


def put(values: dict[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> None:
    """Copies every value into its tensor; after an error all are as they were.

    Args:
        values: on the CPU, of the shape and dtype of the live ones; emptied, so that what was there
            before takes no more memory than what is new.
    """
    before: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name in [*values]:
                target = live[name]
                value = values.pop(name)
                before[name] = _kept(target)
                target.copy_(_distributed(value, target))
    except BaseException as error:
        put_back(before, live)
        if isinstance(error, RuntimeError):
            raise CheckpointMismatchError(
                f"{name} could not be written: {error}. Nothing was changed"
            ) from error
        raise
    finally:
        # a cast of the weights as they were must not be used any more
        torch.clear_autocast_cache()


def kept(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(copies, the tensors) of all of a model that a call of it may change, by name."""
    live = live_tensors(model)
    for name, x in model.named_buffers():  # also those that no state dict holds
        if name not in live and not _unwritable(x):
            live[name] = x
    return {name: _kept(x) for name, x in live.items()}, live


def put_back(before: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> None:
    """Copies what was there before into every tensor that takes it, the last written first.

    Raises:
        CheckpointMismatchError: some took it not; all others have it by then.
    """
    lost, why = [], None
    with torch.no_grad():
        for name, old in reversed([*before.items()]):
            try:
                live[name].copy_(old)
            except RuntimeError as error:
                lost.append(name)
                why = error
    if lost:
        raise CheckpointMismatchError(
            f"weights could not be put back as they were into {', '.join(lost[:4])}"
            f"{', …' if len(lost) > 4 else ''}: {why}. All others are as before"
        ) from why


def _kept(target: torch.Tensor) -> torch.Tensor:
    """A copy, on the CPU but of what is sharded, whose share is small."""
    if isinstance(target, DTensor) or target.device.type == "cpu":
        return target.detach().clone()
    return target.detach().cpu()


def _distributed(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """This rank's share of a whole value, which every rank has read; nothing is sent."""
    if not isinstance(target, DTensor):
        return value
    here = value.to(target.device)
    return distribute_tensor(here, target.device_mesh, target.placements, src_data_rank=None)
