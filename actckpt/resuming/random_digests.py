"""Digests of random states, cheap enough to be taken after every step."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash

from actckpt.resuming.generators import generators_of

# how often all that follows is looked for again
_LOOK_EVERY = 16
# of a run's own generators, in turn
_OWN_AT_A_TIME = 4
# the words of a Mersenne Twister, and its place among them
_NumpyState = ctypes.c_uint32 * 625


class RandomDigests:
    """Of the random states of Python, NumPy, torch, CUDA in use, and of a run's own generators.

    No device is waited for: torch keeps the seed and the offset of a CUDA generator on the host.

    Args:
        objects: what the run was given, by name; may lead to generators.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = objects
        self._numpy: Any = None  # kept, for it owns the memory that is read
        self._numpy_state: Any = None
        self.forget()

    def forget(self) -> None:
        """The objects may lead to others from now on."""
        self._own: dict[str, Any] | None = None

    def digests(self, step: int) -> dict[str, str]:
        """By names for people, as they are now; of many own generators a few at each step."""
        found = {
            "python": _of_python(random.getstate()),
            "numpy": self._of_numpy(whole=step % _LOOK_EVERY == 0),
            "torch": _of_tensor(torch.get_rng_state()),
        }
        if torch.cuda.is_initialized():
            for index, state in enumerate(torch.cuda.get_rng_state_all()):
                found[f"cuda:{index}"] = _of_tensor(state)
        if self._own is None:
            self._own = dict(generators_of(self._objects).by_path)
        if self._own:
            names = list(self._own)
            for place in range(min(_OWN_AT_A_TIME, len(names))):
                name = names[(step * _OWN_AT_A_TIME + place) % len(names)]
                found[name] = _of_generator(self._own[name])
        return found

    def _of_numpy(self, *, whole: bool) -> str:
        """NumPy tells a state as a dictionary, which takes as long as all else here together.

        So its memory is read, without the half of a pair of normal numbers that the legacy
        generator may hold back; that is read in one step in 16.
        """
        if whole or self._numpy is None:
            self._numpy, self._numpy_state = _numpy_memory()
        if whole or self._numpy_state is None:
            return _of_state(np.random.get_state(legacy=False))
        return xxhash.xxh3_64_hexdigest(self._numpy_state)


def _of_tensor(state: torch.Tensor) -> str:
    words: Any = state.numpy()
    return xxhash.xxh3_64_hexdigest(words)


def _of_python(state: tuple[Any, ...]) -> str:
    version, words, pending = state
    # the hash of a tuple of numbers is the same in every process
    return xxhash.xxh3_64_hexdigest(f"{version} {hash(words)} {pending!r}".encode())


def _of_generator(x: Any) -> str:
    if isinstance(x, torch.Generator):
        return _of_tensor(x.get_state())
    if isinstance(x, random.Random):
        return _of_python(x.getstate())
    return _of_state(x.get_state(legacy=False) if hasattr(x, "get_state") else x.state)


def _of_state(state: Any) -> str:
    digest = xxhash.xxh3_64()
    _update(digest, state)
    return digest.hexdigest()


def _update(digest: xxhash.xxh3_64, x: Any) -> None:
    if isinstance(x, Mapping):
        for key in sorted(x):
            digest.update(key.encode())
            _update(digest, x[key])
    elif isinstance(x, np.ndarray):
        digest.update(np.ascontiguousarray(x).data)
    else:
        digest.update(repr(x).encode())


def _numpy_memory() -> tuple[Any, Any]:
    """NumPy's global generator, and its state in memory; None where that is not known."""
    find = getattr(np.random, "get_bit_generator", None)
    generator = None if find is None else find()
    if type(generator) is not np.random.MT19937:
        return generator, None
    return generator, _NumpyState.from_address(generator.ctypes.state_address)
