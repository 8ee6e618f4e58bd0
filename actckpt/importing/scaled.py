"""Weights in 8 bits that are only what they were once multiplied by what is beside them."""

from __future__ import annotations

from actckpt.checkpoint.dtypes import name_of
from actckpt.errors import CheckpointMismatchError
from actckpt.foreign.stored import StoredTensor
from actckpt.importing.source import Source

# what transformers, vLLM and DeepSeek call it
_ENDINGS = ("_scale_inv", "_scale")


def refuse_without_scale(name: str, x: StoredTensor, source: Source) -> None:
    """For what is to be cast to another dtype.

    Raises:
        CheckpointMismatchError: a cast alone would not give the weights.
    """
    if not x.dtype.is_floating_point or x.dtype.itemsize > 1:
        return
    scale = next((name + end for end in _ENDINGS if name + end in source.tensors), None)
    if scale is not None:
        raise CheckpointMismatchError(
            f"{source.where} has {name} as {name_of(x.dtype)}, to be multiplied by {scale}: a cast "
            "alone would not give the weights. Multiply them first, by the library that wrote them "
            "(from_pretrained of transformers with dequantize=True in its quantization_config), "
            "and take that model's state_dict(). Nothing was changed"
        )
