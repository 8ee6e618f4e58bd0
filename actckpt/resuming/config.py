"""The settings of a run that are saved with it, and compared when it is resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from actckpt.checkpoint.encoding import encode
from actckpt.errors import ArgumentError, CheckpointSaveError


def checked_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings, which a checkpoint can hold.

    Raises:
        ArgumentError: it cannot; named by its key.
    """
    if config is not None and not isinstance(config, Mapping):
        raise ArgumentError(
            "config must be a dict of plain values by name; "
            f"found {type(config).__name__}. Pass {_as_dict(config)}"
        )
    found = dict(config or {})
    try:
        encode(found, "config")
    except CheckpointSaveError as error:
        raise ArgumentError(
            f"config is saved with every checkpoint, and not all of it can be: {error}. What only "
            "tells runs apart is best a text, str(value)"
        ) from error
    return found


def _as_dict(config: object) -> str:
    """How to make a dict of what was given."""
    if dataclasses.is_dataclass(config):
        return "dataclasses.asdict(config)"
    if hasattr(config, "__dict__"):
        return "vars(config)"
    return "a dict"
