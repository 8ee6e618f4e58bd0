"""Results whose shapes depend on values: of labels and masks these may be known."""

from __future__ import annotations

from typing import Any

import torch

from actckpt.tracing.real_values import LARGEST_NUMEL, is_fake, real_of, run

aten = torch.ops.aten


def known_results(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Fakes of what ``func`` returns where its shapes depend on values; None if these are unknown.

    Called under the fake mode.
    """
    picked = _picked(func, args)
    if picked is not None:
        return picked
    fakes = [a for a in args if is_fake(a)]
    known, reals = run(func, args, kwargs) if fakes else (False, [])
    if not known or not reals:
        return None
    made = [
        torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device=fakes[0].device)
        for r in reals
    ]
    return made[0] if len(func._schema.returns) == 1 and len(made) == 1 else tuple(made)


def _picked(func: Any, args: tuple[Any, ...]) -> Any:
    """A fake of what masks of known values pick from a tensor, or of where they do; or None."""
    if func is aten.nonzero.default and args[0].numel() > LARGEST_NUMEL:
        count = _count(args[0], args[0].shape)
        return (
            None if count is None else args[0].new_empty((count, args[0].dim()), dtype=torch.int64)
        )
    if func is aten.masked_select.default:
        source, mask = args
        count = _count(mask, torch.broadcast_shapes(source.shape, mask.shape))
        return None if count is None else source.new_empty(count)
    if func is aten.index.Tensor:
        source, indices = args
        found: list[torch.Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
                continue
            count = _count(index, index.shape)
            if count is None:
                return None
            # a mask is one index for each of its dimensions: the positions at which it is set
            found += [index.new_empty(count, dtype=torch.int64) for _ in range(index.dim())]
        return func(source, found)
    return None


def _count(mask: torch.Tensor, shape: torch.Size) -> int | None:
    """How many elements of a mask are set once it has a shape, or None if that is not known."""
    real = real_of(mask)
    if real is None:
        return None
    with torch.utils._python_dispatch._disable_current_modes():
        return int(real.broadcast_to(shape).count_nonzero())
