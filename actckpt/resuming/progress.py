"""How far a run has come: steps, metrics, place in the data, and random states still to be put."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actckpt.resuming.data_position import DataPosition, Loader
from actckpt.resuming.random_states import gather_random_states, put_random_states


class Progress:
    """What changes from step to step and belongs to no object of the user's."""

    def __init__(self, loader: Loader | None) -> None:
        self.loader = loader
        self.position = DataPosition()
        self.step = 0
        self.metrics: dict[str, float] = {}
        # whether a batch was handed out since the last optimizer step
        self.accumulating = False
        # put once nothing of the library draws any more
        self._random: dict[str, Any] | None = None

    def stepped(self, metrics: Mapping[str, Any] | None) -> None:
        """An optimizer step was made."""
        self.step += 1
        self._random, self.accumulating = None, False
        self.metrics = numbers(metrics)

    def items(self) -> dict[str, Any]:
        """The items of a checkpoint that are made of this."""
        random = self._random
        return {
            "progress": {"step": self.step, "metrics": self.metrics},
            "position": self.position.state_dict(self.loader),
            "random": gather_random_states() if random is None else random,
        }

    def put(self, items: Mapping[str, Any]) -> None:
        """Takes what `items` gave; the loader is moved to its place when it is next read."""
        self.position.load_state_dict(items["position"])
        self.step = items["progress"]["step"]
        self.metrics = dict(items["progress"]["metrics"])
        self.accumulating = bool(items["gradients"])
        self._random = items["random"]
        put_random_states(items["random"])

    def put_random(self) -> None:
        """Puts back the random states of a checkpoint, the first time that it is asked."""
        states, self._random = self._random, None
        if states is not None:
            put_random_states(states)


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Metrics as plain floats.

    Raises:
        TypeError: one is neither a number nor a tensor of one.
    """
    found = {}
    for name, value in (metrics or {}).items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"metric {name} must be a number, or a tensor of one; found {value!r:.80}"
            ) from error
    return found
