"""Real values behind small fake tensors, so that ``.item()`` and ``bool()`` have an answer.

A training step asks for values of masks, positions and counters, hardly ever of activations. Every
operation whose tensor arguments all have known values is run on them, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

_ATTRIBUTE = "_actckpt_real"
_LARGEST_INTEGER_NUMEL = 1 << 20
_LARGEST_FLOAT_NUMEL = 64


def is_small(t: torch.Tensor) -> bool:
    """Whether a tensor is worth carrying: integers and masks up to a million, a few floats."""
    if t.layout != torch.strided or t.is_complex():
        return False
    return t.numel() <= (_LARGEST_FLOAT_NUMEL if t.is_floating_point() else _LARGEST_INTEGER_NUMEL)


def attach_real(fake: torch.Tensor, real: torch.Tensor) -> None:
    """Lets ``fake`` answer with a copy of ``real``'s values; does nothing for large tensors."""
    if is_small(real) and not real.requires_grad and not isinstance(real, FakeTensor):
        with torch.utils._python_dispatch._disable_current_modes():
            fake.__dict__[_ATTRIBUTE] = real.detach().clone()


def real_of(fake: torch.Tensor) -> torch.Tensor | None:
    """The values behind ``fake``, or None if they are not known."""
    if not isinstance(fake, FakeTensor):
        return fake if is_small(fake) else None
    return fake.__dict__.get(_ATTRIBUTE)


def propagate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Runs ``func`` on the known values and attaches the result to the fake ``out``.

    When an argument is unknown, results stay unknown and arguments written in place become so.
    """
    if out is None:  # lists changed in place (an optimizer's counters): values change with them
        outputs = [t for t in args[0] if _is_fake(t)] if _changes_list(func, args) else []
    else:
        outputs = [o for o in (out if isinstance(out, (list, tuple)) else (out,)) if _is_fake(o)]
    if not outputs or not all(is_small(o) for o in outputs):
        return
    known, real_args, real_kwargs = _real_arguments(args, kwargs)
    # a generator of the user's own is real, and must not move
    if known and not has_generator(args, kwargs):
        # devices do not matter for values: everything small is computed on the CPU
        if "device" in real_kwargs:
            real_kwargs["device"] = torch.device("cpu")
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            real_out = func(*real_args, **real_kwargs)
        if real_out is None:
            return
        reals = real_out if isinstance(real_out, (list, tuple)) else (real_out,)
        for o, r in zip(outputs, [r for r in reals if isinstance(r, torch.Tensor)], strict=True):
            o.__dict__[_ATTRIBUTE] = r
    else:
        for o in outputs:
            o.__dict__.pop(_ATTRIBUTE, None)


def has_generator(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation draws from a generator that it was given."""
    return any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values()))


def scalar(fake: torch.Tensor) -> Any:
    """The number in a one-element tensor, or None if it is not known."""
    real = real_of(fake)
    if real is None:
        return None
    with torch.utils._python_dispatch._disable_current_modes():
        return real.item()


def _changes_list(func: Any, args: tuple[Any, ...]) -> bool:
    first = func._schema.arguments[0].alias_info if args else None
    return first is not None and first.is_write and isinstance(args[0], (list, tuple))


def _is_fake(x: Any) -> bool:
    return isinstance(x, FakeTensor)


def _real_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, list[Any], dict[str, Any]]:
    known = True

    def convert(x: Any) -> Any:
        nonlocal known
        if isinstance(x, torch.Tensor):
            real = real_of(x)
            if real is None:
                known = False
            return real
        if isinstance(x, (list, tuple)):
            return [convert(i) for i in x]
        return x

    real_args = [convert(a) for a in args]
    real_kwargs = {k: convert(v) for k, v in kwargs.items()}
    return known, real_args, real_kwargs
