"""How far a run has come: steps, metrics, place in the data, and random states still to be put."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed

from actckpt.errors import CheckpointMismatchError
from actckpt.resuming.batch_chain import BatchChain
from actckpt.resuming.data_position import DataPosition, Loader
from actckpt.resuming.generators import RunGenerators
from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.metrics import MetricHistory, numbers
from actckpt.resuming.random_states import gather_random_states, put_random_states


class Progress:
    """What changes from step to step and belongs to no object of the user's.

    Args:
        objects: what the user has passed, which may draw from generators of its own.
    """

    def __init__(self, loader: Loader | None, objects: Mapping[str, Any]) -> None:
        self.read_from(loader)
        self._generators = RunGenerators(objects)
        self.position = DataPosition()
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.history = MetricHistory()
        # whether a batch was handed out since the last optimizer step
        self.accumulating = False
        self.batches = BatchChain()
        # put once nothing of the library draws any more
        self._random: dict[str, Any] | None = None
        self._drawn: dict[str, Any] | None = None

    def read_from(self, loader: Loader | None) -> None:
        """The data comes from there.

        Raises:
            TypeError: nothing can.
        """
        if loader is not None and not hasattr(loader, "__iter__"):
            raise TypeError(
                "loader must be a DataLoader, or another iterable of batches; "
                f"found {type(loader).__name__}"
            )
        self.loader = loader

    def stepped(self, metrics: Mapping[str, Any] | None) -> BatchChain:
        """An optimizer step was made, of the batches that are returned."""
        self.step += 1
        self._random, self._drawn, self.accumulating = None, None, False
        batches, self.batches = self.batches, BatchChain()
        self.metrics = {}
        self.report(numbers(metrics))
        return batches

    def report(self, metrics: Mapping[str, float]) -> None:
        """Metrics of the state as it is now."""
        self.metrics |= metrics
        self.history.report(metrics)

    def items(self) -> dict[str, Any]:
        """The items of a checkpoint that are made of this."""
        random, drawn = self._random, self._drawn
        if drawn is None:
            # in the middle of an epoch, or from one to the next, in workers that persist
            reading = self.position.batch > 0 or getattr(self.loader, "_iterator", None) is not None
            drawn = self._generators.item(self.loader, reading=reading)
        return {
            "progress": {
                "step": self.step,
                "metrics": self.metrics,
                "history": self.history.state_dict(),
                "processes": processes(),
                **({"batches": list(found)} if (found := self.batches.seen) else {}),
            },
            "position": self.position.state_dict(self.loader),
            "random": gather_random_states() if random is None else random,
            "generators": drawn,
        }

    def check(self, items: Mapping[str, Any], where: str) -> None:
        """Raises unless `put` can take these items.

        Raises:
            CheckpointMismatchError: the data is another, or there are fewer processes.
        """
        saved, here = items["progress"]["processes"], processes()
        if saved > here:
            raise CheckpointMismatchError(
                f"{where} was saved by a run of {saved} processes, this is one of {here}: the "
                "others' data and random states have no place. Start as many, or restore with "
                'only=["model", "optimizer"]. Nothing was changed'
            )
        self.position.check(items["position"], self.loader, where)

    def put(self, items: Mapping[str, Any]) -> None:
        """Takes what `items` gave; the loader is moved to its place when it is next read."""
        self.position.load_state_dict(items["position"])
        self.step = items["progress"]["step"]
        self.metrics = dict(items["progress"]["metrics"])
        self.history.load_state_dict(items["progress"]["history"])
        self.accumulating = bool(items["gradients"])
        # those of before a save between two optimizer steps
        before = items["progress"].get("batches")
        self.batches = BatchChain(known=False) if self.accumulating else BatchChain()
        if before is not None:
            self.batches = BatchChain(*before)
        self._random = items["random"]
        put_random_states(items["random"])
        # a version that saved none may have made the checkpoint
        self._drawn = items.get("generators")
        if self._drawn is not None:
            self._generators.put(self._drawn, self.loader)

    def inexact(self, items: Mapping[str, Any]) -> list[str]:
        """Why the data that follows these items may be another than it would have been."""
        found = []
        saved, here = items["progress"]["processes"], processes()
        if saved != here:
            found.append(f"processes were {saved}, are {here}")
        if reason := self.position.inexact(items["position"], self.loader):
            found.append(reason)
        return [*found, *self._generators.inexact(items.get("generators"), self.loader)]

    def put_random(self) -> None:
        """Puts back the random states of a checkpoint, the first time that it is asked."""
        states, self._random = self._random, None
        if states is not None:
            put_random_states(states)
        drawn, self._drawn = self._drawn, None
        if drawn is not None:
            # a loader that puts itself back has its own by now, and may still draw with them
            own = isinstance(self.loader, Stateful)
            self._generators.put(drawn, self.loader, objects_only=own)


def processes() -> int:
    """How many processes train together."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1
