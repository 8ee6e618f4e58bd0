"""Augmentation that is the same wherever and whenever a sample is read."""

from __future__ import annotations

import hashlib
import operator
import random
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class SeededSamples(Dataset[Any]):
    """A dataset whose samples are drawn from (seed, epoch, index) alone.

    What a data loader's workers draw depends on how many there are and what they read before, and
    their random states cannot be saved. Around a dataset that augments, this makes every sample
    the same after a resume in the middle of an epoch, with any number of workers. The random
    states of Python, NumPy and torch (on the CPU) are as before after every read.

    `Checkpointer.steps` tells it the epoch; without one, call `set_epoch`.

    Args:
        dataset: read by index.
        seed: of the whole run.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        # shared, so that workers that persist from epoch to epoch see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that samples are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Samples are drawn for this epoch from now on, in every worker."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seed = _seed_of(self.seed, self.epoch, index)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # torch.manual_seed would seed CUDA too, which the model draws from
        torch.default_generator.manual_seed(seed)
        try:
            return self.dataset[index]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


def _seed_of(seed: int, epoch: int, index: Any) -> int:
    """63 bits of a hash; NumPy's integers and tensors of one count as the integers they are."""
    with suppress(TypeError):
        index = operator.index(index)
    digest = hashlib.blake2b(f"{seed} {epoch} {index!r}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def tell_epoch(loader: Any, epoch: int) -> None:
    """Sets the epoch of every `SeededSamples` that a loader reads through."""
    for dataset in dataset_layers(loader):
        if isinstance(dataset, SeededSamples):
            dataset.set_epoch(epoch)


def draws_by_seed(loader: Any) -> bool:
    """Whether a loader reads through a `SeededSamples`."""
    return any(isinstance(dataset, SeededSamples) for dataset in dataset_layers(loader))


def dataset_layers(loader: Any) -> list[Any]:
    """The dataset of a loader, and those that it wraps (as `torch.utils.data.Subset` does)."""
    return layers_of(getattr(loader, "dataset", None))


def layers_of(dataset: Any) -> list[Any]:
    """A dataset, and those that it wraps."""
    found: list[Any] = []
    layer = dataset
    while layer is not None and all(layer is not known for known in found):
        found.append(layer)
        layer = getattr(layer, "dataset", None)
    return found
