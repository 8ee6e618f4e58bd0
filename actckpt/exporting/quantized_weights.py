"""Weights in a few bits: refused by name, left where they are, or made dense.

Of bitsandbytes, whose state dicts have the scales of a weight beside it, and of torchao, whose
weights are tensors made of others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

from actckpt.checkpoint.wrappers import is_wrapper
from actckpt.errors import WeightsExportError
from actckpt.exporting.prepared import library

# "leave": an adapter has no part in them
Quantized = Literal["refuse", "leave", "dense"]
# the key that says how a weight of 4 bits is kept, and what else is kept of it
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__\w+")
_SCALES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# of a layer of 8 bits, and what an int8 stands for
_ROWS = ".SCB"
_WHOLE = 127.0


def resolved(state: Mapping[str, Any], how: Quantized, where: str) -> dict[str, Any]:
    """A state without quantized weights, or with dense ones in their place.

    Args:
        where: what it is of, for messages.

    Raises:
        WeightsExportError: there are some and they are refused, or the library is missing.
    """
    found = dict(_of_bitsandbytes(state))
    found |= {n: [n] for n, x in state.items() if isinstance(x, torch.Tensor) and _is_whole(x)}
    if not found:
        return dict(state)
    if how == "refuse":
        name = next(iter(found))
        raise WeightsExportError(
            f"{where} has {name} quantized ({len(found)} in all): dequantize=True makes them dense "
            "in formats safetensors and pt; for others, make the model dense (model.dequantize())"
        )
    gone = {key for keys in found.values() for key in keys}
    kept: dict[str, Any] = {}
    for name, x in state.items():
        if name in found and how == "dense":
            kept[name] = _dense(name, found[name], state)
        elif name not in gone:
            kept[name] = x
    return kept


def _is_whole(x: torch.Tensor) -> bool:
    return is_wrapper(type(x)) or x.is_quantized


def _of_bitsandbytes(state: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(a weight, its own key and those of its scales)."""
    for key in state:
        if four := _STATE.fullmatch(key):
            name = four[1]
            scales = [f"{name}.{scale}" for scale in _SCALES]
            yield name, [name, key, *(s for s in scales if s in state)]
        elif key.endswith(_ROWS):
            layer = key.removesuffix(_ROWS)
            if f"{layer}.weight" in state and state[f"{layer}.weight"].dtype == torch.int8:
                yield f"{layer}.weight", [f"{layer}.weight", key, f"{layer}.weight_format"]


def _dense(name: str, keys: list[str], state: Mapping[str, Any]) -> torch.Tensor:
    x: torch.Tensor = state[name]
    if len(keys) == 1:
        dense: torch.Tensor = x.dequantize()
        return dense
    rows = name.removesuffix(".weight") + _ROWS
    if rows in keys:
        scales_of_rows: torch.Tensor = state[rows].float() / _WHOLE
        return x.float() * scales_of_rows[:, None]
    functional: Any = library(
        "bitsandbytes.functional", "bitsandbytes", "making 4-bit weights dense"
    )
    scales = {key.removeprefix(f"{name}."): state[key] for key in keys[1:]}
    made: torch.Tensor = functional.dequantize_4bit(
        x, functional.QuantState.from_dict(scales, x.device)
    )
    return made
