"""Tensors made of others (quantized ones), of the libraries whose classes a checkpoint may name.

A file must not choose what code runs: only these packages are looked into, and there only for
classes of tensors.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from actckpt.errors import CheckpointFormatError

_PACKAGES = ("torchao",)


def is_wrapper(kind: type) -> bool:
    """Whether tensors of this class are saved as those that they are made of."""
    known = kind.__module__.partition(".")[0] in _PACKAGES
    return known and all(hasattr(kind, n) for n in ("__tensor_flatten__", "__tensor_unflatten__"))


def wrapper_named(module: str, name: str) -> Any:
    """The class of tensors of this name.

    Raises:
        CheckpointFormatError: there is none here, or none that a checkpoint may name.
    """
    found: Any = None
    if module.partition(".")[0] in _PACKAGES and name.isidentifier():
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            raise CheckpointFormatError(
                f"a tensor is a {module}.{name}, which cannot be imported: {error}; install what "
                "the run that saved it had"
            ) from error
    if not (isinstance(found, type) and issubclass(found, torch.Tensor) and is_wrapper(found)):
        raise CheckpointFormatError(f"{module}.{name} is no class of tensors known here")
    return found
