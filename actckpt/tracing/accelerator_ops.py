"""The operations that an accelerator would run, where they are not those of the CPU.

On CPU tensors `dropout` draws a mask of the input's type, attention takes the CPU's own kernel,
batch normalization is none of cuDNN's, and a softmax of half precision to float32 converts first.
A function mode sees those calls before torch decides by device, and makes a CUDA build's decision.

References: PyTorch, aten/src/ATen/native: transformers/cuda/sdp_utils.cpp (which attention kernel),
transformers/attention.cpp (how it is called), Normalization.cpp (which batch normalization),
Dropout.cpp and SoftMax.cpp.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from actckpt.errors import PlanError
from actckpt.tracing.stand_in import StandIn

aten = torch.ops.aten

_HALF = (torch.float16, torch.bfloat16)
# rows that cuDNN's batch normalization takes in training, and in evaluation
_TRAINED_ROWS, _ROWS = 880_801, 65_535
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class AcceleratorOps(TorchFunctionMode):
    """While open, torch functions on fake CPU tensors run what ``device`` would run."""

    def __init__(self, device: StandIn) -> None:
        super().__init__()
        self.device = device
        self._handlers: dict[Any, Callable[..., Any]] = {
            functional.scaled_dot_product_attention: self._attention,
            torch.batch_norm: self._batch_norm,
            functional.dropout: _functional_dropout,
            torch.dropout: _dropout,
            torch.softmax: _softmax(aten._softmax.default, torch.softmax),
            torch.Tensor.softmax: _softmax(aten._softmax.default, torch.Tensor.softmax),
            torch.log_softmax: _softmax(aten._log_softmax.default, torch.log_softmax),
            torch.Tensor.log_softmax: _softmax(aten._log_softmax.default, torch.Tensor.log_softmax),
        }
        # Python functions that call others: a mode is off while it handles one
        self._opened = {f: _unguarded(f) for f in _COMPOSED}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = self._handlers.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        opened = self._opened.get(func)
        if opened is not None:
            with self:
                return opened(*args, **kwargs)
        if getattr(func, "__name__", "") in _RECURRENT and not isinstance(args[0], list):
            raise PlanError(
                f"a recurrent layer ({func.__name__}) runs in cuDNN on {self.device.name}, and "
                "only cuDNN knows the memory that it takes: plan on the device itself"
            )
        return func(*args, **kwargs)

    # ---- batch normalization

    def _batch_norm(
        self,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> torch.Tensor:
        call = (input, weight, bias, running_mean, running_var, training, momentum, eps)
        if not cudnn_enabled or not self._normalizes_in_cudnn(*call):
            return torch.batch_norm(*call, cudnn_enabled)
        normalized: torch.Tensor = aten.cudnn_batch_norm(*call)[0]
        return normalized

    def _normalizes_in_cudnn(
        self, input: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool,
        momentum: float, eps: float,
    ) -> bool:  # fmt: skip
        if self.device.rocm or weight is None or bias is None or input.dim() < 3:
            return False
        if (mean is None) != (variance is None) or (mean is None and not training):
            return False
        if torch.bfloat16 in (input.dtype, weight.dtype):
            return False
        if input.dtype is torch.float16 and weight.dtype is not torch.float32:
            return False
        most = _TRAINED_ROWS if training else _ROWS
        return bool(input.shape[0] <= most and input.numel() < 2**31 - 1)

    # ---- attention

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        call = (query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        if self._takes_cudnn(*call):
            bias = _additive(attn_mask, query)
            out = aten._scaled_dot_product_cudnn_attention(
                query, key, value, bias, grad, dropout_p, is_causal, False, scale=scale
            )
        elif self._takes_flash(*call, grad):
            return _flash(query, key, value, dropout_p, is_causal, scale)
        elif self._takes_efficient(*call):
            bias = _aligned(_additive(attn_mask, query), query, key)
            out = aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, grad, dropout_p, is_causal, scale=scale
            )
        else:
            out = aten._scaled_dot_product_attention_math(
                query, key, value, _additive(attn_mask, query), dropout_p, is_causal, None,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        attended: torch.Tensor = out[0]
        return attended

    def _takes_cudnn(
        self, query: Any, key: Any, value: Any, mask: Any, p: float, causal: bool, gqa: bool
    ) -> bool:
        # preferred on Hopper and Blackwell by builds with cuDNN 9.15.1 or later
        if self.device.rocm or self.device.capability[0] not in (9, 10):
            return False
        return (
            _dense(query, key, value, gqa)
            and query.dtype in _HALF
            and 16 * p == math.floor(16 * p)
            and query.shape[-1] <= 128
            and value.shape[-1] <= 128
            and query.shape[-1] % 8 == value.shape[-1] % 8 == 0
            and key.shape[-2] != 1
            and not (p and query.shape[-2] == 1)
            and not (causal and mask is not None)
        )

    def _takes_flash(
        self, query: Any, key: Any, value: Any, mask: Any, p: float, causal: bool, gqa: bool,
        grad: bool,
    ) -> bool:  # fmt: skip
        size = query.shape[-1]
        if mask is not None or query.dtype not in _HALF or self.device.capability < (8, 0):
            return False
        if not size == key.shape[-1] == value.shape[-1] <= 256:
            return False
        if causal and query.shape[-2] != key.shape[-2]:
            return False
        small_cache = (8, 6) <= self.device.capability <= (8, 9)
        if grad and small_cache and size > 192 and (p > 0 or size <= 224):
            return False
        return _dense(query, key, value, gqa)

    def _takes_efficient(
        self, query: Any, key: Any, value: Any, mask: Any, p: float, causal: bool, gqa: bool
    ) -> bool:
        # up to torch 2.13 it does not group queries
        if not _dense(query, key, value, False) or (causal and mask is not None):
            return False
        modern = self.device.capability >= (8, 0)
        half = query.dtype in _HALF
        if query.dtype is torch.bfloat16 and not modern:
            return False
        if not half and query.dtype is not torch.float32:
            return False
        aligned = (8 if half else 4) if modern else (8 if half else 1)
        sizes = (query.shape[-1], key.shape[-1], value.shape[-1])
        return sizes[0] == sizes[1] and all(n % aligned == 0 for n in sizes)


def _dense(query: Any, key: Any, value: Any, grouped: bool) -> bool:
    """Whether the shapes are what a fused kernel takes."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    if any(t.stride(-1) != 1 or 0 in t.shape for t in (query, key, value)):
        return False
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        return False
    heads, of_keys, of_values = (t.shape[1] for t in (query, key, value))
    if grouped:
        return bool(of_keys == of_values and heads % of_keys == 0)
    return bool(heads == of_keys == of_values)


def _additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """A boolean mask as what is added to the scores."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    lowest = torch.scalar_tensor(-math.inf, dtype=query.dtype, device=mask.device)
    return torch.where(mask, 0.0, lowest)


def _aligned(
    bias: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """The bias in the layout that the efficient kernel reads."""
    if bias is None:
        return None
    bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    length = bias.shape[-1]
    if length % 16:
        return functional.pad(bias, (0, 16 - length % 16))[..., :length]
    if any(step % 16 for step in bias.stride()[:3]):
        return bias.contiguous()
    return bias


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Flash attention, whose heads are padded to a multiple of eight."""
    size = query.shape[-1]
    if size % 8:
        scale = 1 / math.sqrt(size) if scale is None else scale
        query, key, value = (functional.pad(t, (0, 8 - size % 8)) for t in (query, key, value))
    out: torch.Tensor = aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]
    return out[..., :size] if size % 8 else out


# ---- dropout and softmax


def _functional_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    if inplace or not 0 < p < 1:
        return functional.dropout(input, p, training, inplace)
    return _dropout(input, p, training)


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    if not train or not 0 < p < 1 or not input.numel():
        return torch.dropout(input, p, train)
    out: torch.Tensor = aten.native_dropout(input, p, train)[0]
    return out


def _softmax(fused: Any, plain: Any) -> Callable[..., torch.Tensor]:
    def call(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dim = args[0] if args else kwargs.get("dim")
        dtype = args[1] if len(args) > 1 else kwargs.get("dtype")
        half = input.dtype is torch.float16 and dtype is torch.float32
        if half and isinstance(dim, int):
            out: torch.Tensor = fused(input, dim, True)
            return out
        out = plain(input, *args, **kwargs)
        return out

    return call


# Python functions in which others are called: backward, too, because of recomputations
_COMPOSED = (
    torch.Tensor.backward,
    torch.autograd.backward,
    torch.autograd.grad,
    functional.batch_norm,
    functional.multi_head_attention_forward,
    functional.softmax,
    functional.log_softmax,
)


def _unguarded(function: Any) -> Any:
    """The function without its question for overrides, which a mode answers with yes for ever."""
    guards = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = function.__globals__ | dict.fromkeys(guards, lambda *_: False)
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
