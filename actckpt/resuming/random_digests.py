"""Digests of random states, cheap enough to be taken after every step."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash

# numpy tells its state as a dictionary with a list, which takes as long as all else here together
_NUMPY_WHOLE_EVERY = 16
# the words of a Mersenne Twister, and its place among them
_NUMPY_STATE = ctypes.c_uint32 * 625


def random_digests(step: int) -> dict[str, str]:
    """Digests of the random states of Python, NumPy, torch, and CUDA where in use.

    No device is waited for: torch keeps the seed and the offset of a CUDA generator on the host.

    Args:
        step: NumPy's state is read whole in one step in 16, else without the half of a pair of
            normal numbers that the legacy generator may hold back.
    """
    found = {
        "python": _of_python(),
        "numpy": _of_numpy(whole=step % _NUMPY_WHOLE_EVERY == 0),
        "torch": _of_tensor(torch.get_rng_state()),
    }
    if torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            found[f"cuda:{index}"] = _of_tensor(state)
    return found


def _of_tensor(state: torch.Tensor) -> str:
    words: Any = state.numpy()
    return xxhash.xxh3_64_hexdigest(words)


def _of_python() -> str:
    version, words, pending = random.getstate()
    # the hash of a tuple of numbers is the same in every process
    return xxhash.xxh3_64_hexdigest(f"{version} {hash(words)} {pending!r}".encode())


def _of_numpy(*, whole: bool) -> str:
    address = None if whole else _numpy_address()
    if address is not None:
        return xxhash.xxh3_64_hexdigest(_NUMPY_STATE.from_address(address))
    state: dict[str, Any] = dict(np.random.get_state(legacy=False))
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


def _numpy_address() -> int | None:
    """Where NumPy's global generator keeps its state; None where that is not known."""
    find = getattr(np.random, "get_bit_generator", None)
    generator = None if find is None else find()
    if type(generator) is not np.random.MT19937:
        return None
    return int(generator.ctypes.state_address)
