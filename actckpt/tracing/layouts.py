"""How real kernels lay out what they return, where fake ones do it otherwise.

`python -m experiments.layouts` compares them over drawn layouts. Where a dimension is 1 its step
means nothing to the elements, and yet kernels ask for it: by it they tell channels last from
contiguous, where both are true, and choose the layout of what they return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten

Strides = tuple[int, ...]
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def contiguous(shape: Sequence[int]) -> Strides:
    """Row by row."""
    strides: Strides = torch._prims_common.make_contiguous_strides_for(tuple(shape))
    return strides


def channels_last(shape: Sequence[int]) -> Strides:
    """Channels (dimension 1) innermost."""
    return dense(shape, (1, *range(len(shape) - 1, 1, -1), 0))


def dense(shape: Sequence[int], order: Sequence[int]) -> Strides:
    """Without gaps; ``order`` lists the dimensions from the innermost outwards."""
    strides, step = [0] * len(shape), 1
    for d in order:
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)


def is_dense(t: torch.Tensor) -> bool:
    """Whether elements neither share memory nor leave gaps, in any order of dimensions."""
    step = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride != step:
            return False
        step *= size
    return True


def suggested(t: torch.Tensor) -> Strides:
    """Channels last where a tensor's own steps say so, else contiguous.

    C++ asks with `suggest_memory_format`: unlike `is_contiguous` that looks at dimensions of 1.
    """
    shape, stride = t.shape, t.stride()
    if t.dim() not in _CHANNELS_LAST or stride[1] == 0:
        return contiguous(shape)
    least = 0
    for d in (1, *range(t.dim() - 1, 1, -1), 0):
        if shape[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return contiguous(shape)
        least = stride[d] * max(shape[d], 1)
    return channels_last(shape)


def as_contiguous_first(t: torch.Tensor) -> Strides:
    """Channels last where a tensor lies so and is not contiguous, too; else contiguous."""
    last = _CHANNELS_LAST.get(t.dim())
    if last is None or t.is_contiguous() or not t.is_contiguous(memory_format=last):
        return contiguous(t.shape)
    return channels_last(t.shape)


def closed(t: torch.Tensor) -> Strides:
    """A tensor's own strides, or where it has gaps the same order of dimensions without them."""
    return t.stride() if is_dense(t) else dense(t.shape, _order(t.shape, [t.stride()]))


def elementwise(shape: Sequence[int], operands: Sequence[torch.Tensor], scalar: bool) -> Strides:
    """What TensorIterator chooses for the result of an operation on elements.

    Args:
        operands: in the order of the arguments.
        scalar: a number is one of the operands, too.
    """
    if not scalar and all(t.shape == tuple(shape) for t in operands):
        if all(t.is_contiguous() for t in operands):
            return contiguous(shape)
        last = torch.channels_last
        if len(shape) == 4 and all(t.is_contiguous(memory_format=last) for t in operands):
            return channels_last(shape)
        first = operands[0].stride()
        if all(t.stride() == first and is_dense(t) for t in operands):
            return tuple(first)
    order = _order(shape, [_steps(shape, t) for t in operands])
    if order == list(range(len(shape) - 1, -1, -1)):
        return contiguous(shape)
    return dense(shape, order)


def _steps(shape: Sequence[int], t: torch.Tensor) -> list[int]:
    """An operand's steps over the result's elements, 0 where it is repeated."""
    before = len(shape) - t.dim()
    return [0] * before + [
        0 if n == 1 and shape[before + d] != 1 else step
        for d, (n, step) in enumerate(zip(t.shape, t.stride(), strict=True))
    ]


def _order(shape: Sequence[int], operands: Sequence[Sequence[int]]) -> list[int]:
    """Dimensions from the innermost outwards; the first operand that has an opinion decides."""

    def compared(a: int, b: int) -> int:
        for steps in operands:
            if steps[a] == 0 or steps[b] == 0:
                continue
            if steps[a] != steps[b]:
                return 1 if steps[a] > steps[b] else -1
            if shape[a] > shape[b]:
                return 1
        return 0

    order = list(range(len(shape) - 1, -1, -1))
    # an insertion sort, which undecided pairs neither stop nor swap
    for i in range(1, len(order)):
        at = i
        for before in range(i - 1, -1, -1):
            verdict = compared(order[before], order[at])
            if verdict > 0:
                order[before], order[at] = order[at], order[before]
                at = before
            elif verdict < 0:
                break
    return order


# ---- what each operation does: strides of its first result, None where the fake kernel is right

_Rule = Callable[["Made"], Strides | None]


class Made(NamedTuple):
    """An operation that has run on fake tensors, and its first result."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: torch.Tensor


def _of_elements(made: Made) -> Strides | None:
    operands = [a for a in made.args if isinstance(a, torch.Tensor)]
    if 1 not in made.out.shape or not operands:
        return None
    if made.func in _SECOND_FIRST:
        operands[:2] = operands[1::-1]
    return elementwise(made.out.shape, operands, _takes_number(made))


def _takes_number(made: Made) -> bool:
    """Whether a number is an operand: a tensor without dimensions, to TensorIterator."""
    if made.func._overloadname in ("Scalar", "ScalarSelf", "ScalarOther"):
        return True
    return any(
        isinstance(a, (bool, int, float, complex)) and isinstance(argument.type, torch.TensorType)
        for argument, a in zip(made.func._schema.arguments, made.args, strict=False)
    )


def _preserved(made: Made) -> Strides | None:
    """As the first argument lies, gaps closed, where no other layout is asked for."""
    asked = made.kwargs.get("memory_format")
    if 1 not in made.out.shape or asked not in (None, torch.preserve_format):
        return None
    return closed(made.args[0])


def _preserved_if_dense(made: Made) -> Strides | None:
    return _preserved(made) if is_dense(made.args[0]) else None


def _as_second(made: Made) -> Strides | None:
    return closed(made.args[1])


def _viewed(made: Made) -> Strides | None:
    """By C++'s own function for views, which needs no memory."""
    if 1 not in made.out.shape:
        return None
    viewed = made.args[0]
    with torch.utils._python_dispatch._disable_current_modes():
        meta = torch.empty_strided(viewed.shape, viewed.stride(), device="meta")
        return meta.view(tuple(made.out.shape)).stride()


def _rows(made: Made) -> Strides:
    return contiguous(made.out.shape)


def _image(made: Made) -> Strides:
    """As the image that comes first lies."""
    return as_contiguous_first(made.args[0])


def _image_behind(made: Made) -> Strides:
    return as_contiguous_first(made.args[1])


def _group(made: Made) -> Strides:
    return suggested(made.args[0])


# gradient and input change places on the way to TensorIterator
_SECOND_FIRST = {aten.threshold_backward.default}
_RULES: dict[Any, _Rule] = {
    aten.native_layer_norm.default: _rows,
    aten.native_layer_norm_backward.default: _rows,
    aten._log_softmax.default: _rows,
    aten.masked_fill.Scalar: _rows,
    aten.masked_fill.Tensor: _rows,
    aten._log_softmax_backward_data.default: _rows,
    aten.view.default: _viewed,
    aten._unsafe_view.default: _viewed,
    aten._weight_norm_interface.default: _rows,
    aten.clone.default: _preserved,
    aten.empty_like.default: _preserved,
    aten.zeros_like.default: _preserved,
    aten.ones_like.default: _preserved,
    aten.full_like.default: _preserved,
    aten.rand_like.default: _preserved,
    aten.randn_like.default: _preserved,
    aten._to_copy.default: _preserved_if_dense,
    aten.index_put.default: _preserved,
    aten.nll_loss2d_backward.default: _as_second,
}
# kernels of other devices choose otherwise
_CPU_RULES: dict[Any, _Rule] = {
    aten.native_batch_norm.default: _image,
    aten._native_batch_norm_legit.default: _image,
    aten._native_batch_norm_legit_functional.default: _image,
    aten.native_batch_norm_backward.default: _image_behind,
    aten.native_group_norm.default: _group,
    aten.roll.default: _group,  # made of two slices that are put together
    aten._scaled_dot_product_flash_attention_for_cpu.default: _preserved,
}


def laid_out(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, *, accelerated: bool
) -> Any:
    """Results in the layout that real kernels give them, where fake ones give another."""
    several = isinstance(out, tuple)
    first = out[0] if several and out else out
    if not isinstance(first, torch.Tensor):
        return out
    rule = _RULES.get(func)
    if rule is None and first.device.type == "cpu" and not accelerated:
        rule = _CPU_RULES.get(func)
    if rule is None and torch.Tag.pointwise in func.tags and not func._schema.is_mutable:
        rule = _of_elements
    if rule is None:
        return out
    first = _restrided(first, rule(Made(func, args, kwargs, first)))
    if func is aten._weight_norm_interface.default:
        return (first, _restrided(out[1], args[1].stride()))  # the norms lie as the given ones
    return (first, *out[1:]) if several else first


def _restrided(out: torch.Tensor, strides: Strides | None) -> torch.Tensor:
    if strides is None or out.stride() == tuple(strides):
        return out
    return out.as_strided(out.shape, strides)
