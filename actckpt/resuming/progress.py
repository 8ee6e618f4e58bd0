"""How far a run has come: steps, metrics, place in the data, and random states still to be put."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed

from actckpt.errors import ArgumentError, CheckpointMismatchError
from actckpt.resuming.batch_chain import BatchChain
from actckpt.resuming.data_position import DataPosition
from actckpt.resuming.generators import RunGenerators
from actckpt.resuming.loaders import Loader, source_of
from actckpt.resuming.metrics import MetricHistory
from actckpt.resuming.other_world import moved
from actckpt.resuming.passes import Pass
from actckpt.resuming.random_states import gather_random_states, put_random_states
from actckpt.resuming.watching import watch


class Progress:
    """What changes from step to step and belongs to no object of the user's.

    Args:
        objects: what the user has passed, which may draw from generators of its own.
    """

    def __init__(self, loader: Loader | None, objects: Mapping[str, Any]) -> None:
        self._objects = objects
        self._generators = RunGenerators(objects)
        self.position = DataPosition(self)
        self._unwatch: list[Callable[[], None]] = []
        self.loader: Loader | None = None
        self.read_from(loader)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.history = MetricHistory()
        # whether a batch was handed out since the last optimizer step
        self.accumulating = False
        self.batches = BatchChain()
        # put once nothing of the library draws any more
        self._random: dict[str, Any] | None = None
        self._drawn: dict[str, Any] | None = None
        # what was put, as long as it may have to be put again
        self._put: tuple[dict[str, Any], dict[str, Any] | None] | None = None
        self._of_its_time = False
        # what of the data is other where other processes saved it
        self._moved = ""
        # who is told of batches that a loop of the user's own is given; not kept alive by this
        self._told: Callable[[], Callable[[BatchChain, Any], None] | None] = lambda: None
        self._asked: Callable[[], Callable[[], None] | None] = lambda: None

    def read_from(self, loader: Loader | None) -> None:
        """The data comes from there.

        Raises:
            ArgumentError: nothing can.
        """
        if loader is not None and not hasattr(loader, "__iter__"):
            raise ArgumentError(
                "loader must be a DataLoader, or another iterable of batches; "
                f"found {type(loader).__name__}"
            )
        if loader is self.loader:
            return
        self.unwatch()
        self.loader = loader
        if loader is None:
            return
        self.position.begins(loader)
        source = source_of(loader)
        told: list[Any] = [(loader, self.position.watched)]
        told += [(source, self.position.source_opened)] if source is not loader else []
        ends = [watch(one, method) for one, method in told]
        self._unwatch = [end for end in ends if end is not None]

    def unwatch(self) -> None:
        """Nobody is told any more when the loader is iterated."""
        for end in self._unwatch:
            end()
        self._unwatch = []

    def handed_out_elsewhere(self, made: Pass, batch: Any) -> None:
        """A loop of the user's own was given a batch."""
        if made.chain is None:
            made.chain = replace(self.batches) if made.goes_on else BatchChain()
        if (told := self._told()) is not None:
            told(made.chain, batch)

    def asked_on(self) -> None:
        """It has done with the last one what it does."""
        if (asked := self._asked()) is not None:
            asked()

    def tell(
        self,
        told: Callable[[], Callable[[BatchChain, Any], None] | None],
        asked: Callable[[], Callable[[], None] | None],
    ) -> None:
        """Of what a loop of the user's own is given, and that it asks for more.

        Args:
            told, asked: weak references to who wants to know.
        """
        self._told, self._asked = told, asked

    def stepped(self, metrics: Mapping[str, float]) -> BatchChain:
        """An optimizer step was made, of the batches that are returned."""
        self.step += 1
        self._random, self._drawn, self._put, self.accumulating = None, None, None, False
        self._of_its_time = False
        batches, self.batches = self._batches_in_hand(), BatchChain()
        self.position.stepped()
        self.metrics = {}
        self.report(metrics)
        return batches

    def report(self, metrics: Mapping[str, float]) -> None:
        """Metrics of the state as it is now."""
        self.metrics |= metrics
        self.history.report(metrics)

    def items(self) -> dict[str, Any]:
        """The items of a checkpoint that are made of this."""
        random, drawn = self._random, self._drawn
        if drawn is None:
            workers_drew = self.position.workers_drew(self.loader)
            drawn = self._generators.item(self.loader, reading=workers_drew)
        return {
            "progress": {
                "step": self.step,
                "metrics": self.metrics,
                "history": self.history.state_dict(),
                "processes": processes(),
                **({"batches": list(found)} if (found := self._batches_in_hand().seen) else {}),
            },
            "position": self.position.state_dict(self.loader, trained=self._is_trained()),
            "random": gather_random_states() if random is None else random,
            "generators": drawn,
        }

    def _batches_in_hand(self) -> BatchChain:
        """Those since the last optimizer step."""
        made = self.position.watched_pass
        return self.batches if made is None or made.chain is None else made.chain

    def _is_trained(self) -> bool:
        optimizers = (o for o in self._objects.values() if isinstance(o, torch.optim.Optimizer))
        return any(o.state for o in optimizers)

    def moved(self, items: dict[str, Any]) -> dict[str, Any]:
        """The items for this many processes, where others saved; `inexact` says what is other."""
        saved, here = items["progress"]["processes"], processes()
        self._moved = ""
        if saved == here:
            return items
        position, self._moved = moved(items["position"], self.loader, saved, here)
        return {**items, "position": position}

    def check(self, items: Mapping[str, Any], where: str, *, of_all: bool) -> None:
        """Raises unless `put` can take these items.

        Args:
            of_all: every process that trained has saved its own.

        Raises:
            CheckpointMismatchError: the data is another, or there are fewer processes.
        """
        saved, here = items["progress"]["processes"], processes()
        if saved > here and not of_all:
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
            other = f": what they draw is other, and {self._moved}" if self._moved else ""
            found.append(f"processes were {saved}, are {here}{other}")
        step = items["progress"]["step"]
        found += self.position.inexact(items["position"], self.loader, step)
        if self._moved:
            self.position.doubt(items["position"])
        return [*found, *self._generators.inexact(items.get("generators"), self.loader)]

    def keep_random(self) -> None:
        """Random states of a checkpoint are put no more: a pass begins with those of its time."""
        self._random = self._drawn = self._put = None
        self._of_its_time = True

    def pass_begins(self) -> None:
        """One does that was restored: what beginning it draws must not count."""
        if self._of_its_time:
            self._put, self._of_its_time = (gather_random_states(), None), False

    def put_random(self) -> None:
        """Puts back the random states of a checkpoint, as long as no step was made since."""
        if self._random is not None:
            self._put = self._random, self._drawn
            self._random = self._drawn = None
        if self._put is None:
            return
        random, drawn = self._put
        put_random_states(random)
        if drawn is not None:
            # a loader that puts itself back has its own by now, and may still draw with them
            own = self.position.is_loaders_own
            self._generators.put(drawn, self.loader, objects_only=own)


def processes() -> int:
    """How many processes train together."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1
