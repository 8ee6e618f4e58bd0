"""Whether a loader can be brought to a saved position at all."""

from __future__ import annotations

from typing import Any

from actckpt.errors import CheckpointMismatchError
from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.loaders import (
    facts_of,
    is_streamed,
    length_of,
    own_state_of,
    source_of,
    workers_of,
)


def check_fits(state: dict[str, Any], loader: Any, where: str) -> None:
    """Raises unless it can.

    Args:
        state: of a `DataPosition`.
        where: the checkpoint, for messages.

    Raises:
        CheckpointMismatchError: it has another number of batches, or is of another kind.
    """
    here, there = length_of(loader), state["batches"]
    if there is not None and here != there:
        raise CheckpointMismatchError(
            f"{where} was saved with a loader of {there} batches an epoch, this one has "
            f"{here}: its order cannot be replayed. Pass the same data, batch size and "
            "drop_last. Nothing was changed"
        )
    mine, theirs = facts_of(loader), state["order"]
    changed = [k for k in mine if k in theirs and mine[k] != theirs[k]]
    if state["batch"] and changed:
        first = changed[0]
        raise CheckpointMismatchError(
            f"{where} was saved in the middle of an epoch with {first} {theirs[first]}, this "
            f"loader has {mine[first]}: its order cannot be replayed. Pass the same data, "
            "batch size, drop_last and sampler. Nothing was changed"
        )
    if state["batch"] and "loader" in state and not isinstance(loader, Stateful):
        raise CheckpointMismatchError(
            f"{where} was saved with a loader that had a state_dict of its own, unlike this "
            "one. Nothing was changed"
        )
    if state["batch"] and "loader" not in state and own_state_of(loader) is not None:
        raise CheckpointMismatchError(
            f"{where} was saved with a loader that had no state_dict of its own, unlike this "
            "one. Nothing was changed"
        )
    _check_stream(state, loader, where)


def _check_stream(state: dict[str, Any], loader: Any, where: str) -> None:
    here, there = workers_of(loader), state["workers"]
    if state["batch"] and is_streamed(source_of(loader)) and None is not there != here:
        name = type(loader.dataset).__name__
        raise CheckpointMismatchError(
            f"{where} was saved in the middle of an epoch of {name}, an IterableDataset that "
            f"{there} workers read between them; this loader has {here}. Each would begin elsewhere"
            f": samples would come again, and others never. Pass num_workers={there}. Nothing was "
            "changed"
        )
