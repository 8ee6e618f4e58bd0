"""Real values behind small fake tensors, so that ``.item()`` and ``bool()`` have an answer.

A training step asks for values of masks, positions and counters, hardly ever of activations. Every
operation whose tensor arguments all have known values is run on them, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

_ATTRIBUTE = "_actckpt_real"
# of a storage behind which values were written that are not known
_STALE = "_actckpt_stale"
LARGEST_NUMEL = 1 << 20
# real numbers that are made of known ones (a mask of ones), and others
_LARGEST_FLOAT_NUMEL = 1 << 16
FEW = 64
aten = torch.ops.aten
# their results' shapes depend on the lengths of labels, not on activations
_SHAPED_BY_INTEGERS = {aten._ctc_loss.Tensor}
# their results depend on the shape of a tensor alone
_BLIND = {
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
}


# answered though nothing is known of their arguments, or most of it
_ANSWERED = {
    *_BLIND,
    *_SHAPED_BY_INTEGERS,
    aten.isnan.default,
    aten.isinf.default,
    aten._is_all_true.default,
    aten.eq.Tensor,
    aten.ne.Tensor,
    aten.ne.Scalar,
}


# from a tensor to the values behind it
_Of = Callable[[torch.Tensor], torch.Tensor | None]


def is_small(t: torch.Tensor, floats: int = FEW) -> bool:
    """Whether a tensor is worth carrying: integers and masks up to a million, ``floats`` others."""
    if t.layout != torch.strided or t.is_complex():
        return False
    return t.numel() <= (floats if t.is_floating_point() else LARGEST_NUMEL)


def attach_real(fake: torch.Tensor, real: torch.Tensor) -> None:
    """Lets ``fake`` answer with a copy of ``real``'s values; does nothing for large tensors."""
    if is_small(real) and not real.requires_grad and not isinstance(real, FakeTensor):
        with torch.utils._python_dispatch._disable_current_modes():
            fake.__dict__[_ATTRIBUTE] = real.detach().clone()


def real_of(fake: torch.Tensor) -> torch.Tensor | None:
    """The values behind ``fake``, or None if they are not known."""
    if not isinstance(fake, FakeTensor):
        return fake if is_small(fake) else None
    real: torch.Tensor | None = fake.__dict__.get(_ATTRIBUTE)
    if real is None or getattr(real.untyped_storage(), _STALE, False):
        return None
    return real


def know(fake: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """``fake``, which has the values of `real_of` another, if those are known."""
    if real is not None:
        fake.__dict__[_ATTRIBUTE] = real
    return fake


def propagate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Runs ``func`` on the known values and attaches the result to the fake ``out``.

    When an argument is unknown, results stay unknown, and what is written in place becomes so, with
    all that lies in the same storage.
    """
    if func not in _ANSWERED and _unknown((*args, *kwargs.values())):
        return
    if out is None:  # lists changed in place (an optimizer's counters): values change with them
        outputs = [t for t in args[0] if is_fake(t)] if _changes_list(func, args) else []
    else:
        outputs = [o for o in (out if isinstance(out, (list, tuple)) else (out,)) if is_fake(o)]
    # drawn ones are other values in every step; a few may be asked (the layers to leave out)
    floats = FEW if torch.Tag.nondeterministic_seeded in func.tags else _LARGEST_FLOAT_NUMEL
    small = all(is_small(o, floats) for o in outputs)
    if func._schema.is_mutable:  # what lies in one element's memory cannot be written into
        small = small and not any(_overlaps(real_of(o)) for o in outputs)
    known, reals = run(func, args, kwargs) if small and outputs else (False, [])
    if not known:
        reals = _alike(func, args, kwargs, outputs)
    if known or reals:
        for o, r in zip(outputs, reals, strict=True) if reals else ():
            o.__dict__[_ATTRIBUTE] = r
        return
    for o in (*outputs, *_statistics(func, args)):
        real = o.__dict__.pop(_ATTRIBUTE, None)
        if real is not None:
            setattr(real.untyped_storage(), _STALE, True)


def _unknown(args: Sequence[Any]) -> bool:
    """Whether there are tensors, and nothing is known of any."""
    found = False
    for x in args:
        if type(x) is FakeTensor:
            if _ATTRIBUTE in x.__dict__:
                return False
            found = True
        elif isinstance(x, (list, tuple)):
            if any(isinstance(i, (torch.Tensor, list, tuple)) for i in x):
                if not _unknown(x):
                    return False
                found = True
        elif isinstance(x, torch.Tensor):
            return False
    return found


def _if_finite(func: Any, args: tuple[Any, ...]) -> bool | None:
    """What a check for numbers that are not finite answers where all are; None if it is none.

    Models ask whether something overflowed, and do something about it; a step is planned as if
    nothing did. One in which something does goes another way, as any forward that changes.
    Distributions check their arguments, and a step is planned as if these were valid.
    """
    if func in (aten.isnan.default, aten.isinf.default):
        return False
    if func is aten._is_all_true.default:
        return True
    if func in (aten.eq.Tensor, aten.ne.Tensor) and args[0] is args[1]:
        return func is aten.eq.Tensor
    if func is aten.ne.Scalar and args[1] == math.inf:
        return True  # the other half of `isfinite`
    return None


def _alike(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The result if all its elements are known to be the same, however many; else none.

    It takes the memory of one element.
    """
    if len(outputs) != 1 or func._schema.is_mutable:
        return []
    shape = outputs[0].shape
    with torch.utils._python_dispatch._disable_current_modes():
        answer = _if_finite(func, args)
        if answer is not None:
            return [torch.tensor(answer).expand(shape)]
        if func._schema.returns[0].alias_info is not None:  # a view
            one = _one_of(args[0]) if isinstance(args[0], torch.Tensor) else None
            return [] if one is None else [one.expand(shape)]
        if func in _BLIND or not (
            torch.Tag.pointwise in func.tags or func is aten._to_copy.default
        ):
            return []
        known, reals = run(func, args, kwargs, _one_of)
        return [r.expand(shape) for r in reals] if known else []


def _one_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The one value that all elements of a tensor have, if that is known."""
    real = real_of(tensor)
    if real is None or any(real.stride()) or not real.numel():
        return None
    return real.as_strided((), ())


def _overlaps(real: torch.Tensor | None) -> bool:
    """Whether elements share memory."""
    if real is None:
        return False
    return any(n > 1 and step == 0 for n, step in zip(real.shape, real.stride(), strict=True))


def _statistics(func: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """BatchNorm's running statistics, which its kernels move without saying so."""
    if "batch_norm" not in func.__name__:
        return []
    named = zip(func._schema.arguments, args, strict=False)
    return [x for a, x in named if a.name.startswith("running_") and is_fake(x)]


def run(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], of: _Of = real_of
) -> tuple[bool, list[torch.Tensor]]:
    """Whether the values of all arguments that matter are known; what ``func`` makes of them."""
    known, real_args, real_kwargs = _real_arguments(func, args, kwargs, of)
    # a generator of the user's own is real, and must not move
    if not known or has_generator(args, kwargs):
        return False, []
    # devices do not matter for values: everything small is computed on the CPU
    if "device" in real_kwargs:
        real_kwargs["device"] = torch.device("cpu")
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        out = func(*real_args, **real_kwargs)
    results = out if isinstance(out, (list, tuple)) else (out,)
    return True, [r for r in results if isinstance(r, torch.Tensor)]


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


def is_fake(x: Any) -> bool:
    return isinstance(x, FakeTensor)


def _real_arguments(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], of: _Of
) -> tuple[bool, list[Any], dict[str, Any]]:
    known = True

    def convert(x: Any) -> Any:
        nonlocal known
        if isinstance(x, torch.Tensor):
            real = of(x)
            if real is None and (
                func in _BLIND or (func in _SHAPED_BY_INTEGERS and x.is_floating_point())
            ):
                with torch.utils._python_dispatch._disable_current_modes():
                    real = torch.zeros(x.shape, dtype=x.dtype)
            if real is None:
                known = False
            return real
        if isinstance(x, (list, tuple)):
            return [convert(i) for i in x]
        return x

    real_args = [convert(a) for a in args]
    real_kwargs = {k: convert(v) for k, v in kwargs.items()}
    return known, real_args, real_kwargs
