"""Whether a process trains on its own or is a rank of many, and what of a run depends on that."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from actckpt.checkpoint.files import Files
from actckpt.checkpoint.retention import Keep
from actckpt.errors import ArgumentError
from actckpt.resuming.cadence import Cadence, Every
from actckpt.resuming.choosing import Choice, OwnChoice
from actckpt.resuming.directory import RunDirectory
from actckpt.resuming.places import Places
from actckpt.resuming.run_state import RunState
from actckpt.units import parse_seconds


class Company(Protocol):
    """With whom a run trains.

    Attributes:
        ranked: whether there are others, or the model is cut as if there were.
    """

    ranked: bool

    def directory(
        self, path: str, files: Files, keep: Keep, verify: str, *, fresh: bool
    ) -> RunDirectory:
        """The directory of the run."""

    def choice(self, places: Places, state: RunState) -> Choice:
        """Who says what it goes on from."""

    def cadence(self, every: Every, mtbf: str) -> Cadence:
        """When it saves."""

    def beside(
        self, path: str, keep: Keep, verify: str, main: RunDirectory, number: int, *, fresh: bool
    ) -> RunDirectory:
        """A faster folder beside the directory; the ``number``-th of them."""

    def cadence_beside(self, every: Every, number: int) -> Cadence:
        """When it saves there."""

    @property
    def uploads(self) -> bool:
        """Whether this process copies checkpoints to stores."""

    def same(self, step: int, found: bool) -> bool:
        """What the first process has found after this step, whatever this one did."""

    def ends(self, step: int, *, asked: bool) -> bool:
        """Whether it is to save and end after this step, of which this process may be asked."""


class Alone:
    """Nobody else."""

    ranked = False

    def directory(
        self, path: str, files: Files, keep: Keep, verify: str, *, fresh: bool
    ) -> RunDirectory:
        """As `Company.directory`."""
        return RunDirectory(path, files, keep, verify, fresh=fresh)

    def choice(self, places: Places, state: RunState) -> Choice:
        """As `Company.choice`."""
        return OwnChoice(places, state.joined)

    def cadence(self, every: Every, mtbf: str) -> Cadence:
        """As `Company.cadence`."""
        return Cadence(every, mtbf)

    def beside(
        self, path: str, keep: Keep, verify: str, main: RunDirectory, number: int, *, fresh: bool
    ) -> RunDirectory:
        """As `Company.beside`."""
        return RunDirectory(path, main.files, keep, verify, fresh=fresh, beside=True)

    def cadence_beside(self, every: Every, number: int) -> Cadence:
        """As `Company.cadence_beside`."""
        return Cadence(every)

    uploads = True

    def same(self, step: int, found: bool) -> bool:
        """As `Company.same`."""
        return found

    def ends(self, step: int, *, asked: bool) -> bool:
        """As `Company.ends`."""
        return asked


def company_of(model: Any, silence: str, timeout: str) -> Company:
    """With whom a process trains this model.

    Args:
        silence, timeout: ``rank_silence`` and ``rank_timeout`` of `actckpt.Checkpointer`.

    Raises:
        ArgumentError: they are no durations.
    """
    silent_s, most_s = parse_seconds(silence), parse_seconds(timeout)
    if not silent_s or not most_s:
        raise ArgumentError(
            'rank_silence and rank_timeout must be durations such as "10s"; found '
            f"{silence!r} and {timeout!r}"
        )
    if not is_ranked(model):
        return Alone()
    # torch's distributed packages take a second to import
    from actckpt.resuming.together import Together
    from actckpt.sharded.exchange import Exchange
    from actckpt.sharded.waiting import Patience

    return Together(Exchange(Patience(silent_s, most_s)))


def is_ranked(model: Any) -> bool:
    """Whether a run is one of many ranks, or its model is cut as if it were."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1 or (
        isinstance(model, nn.Module)
        and any(hasattr(p, "__create_chunk_list__") for p in model.parameters())
    )
