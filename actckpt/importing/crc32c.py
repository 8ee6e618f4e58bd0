"""CRC-32C (Castagnoli) of large data: many stretches at once, put together afterwards.

The register is linear in the data, so that the checksum of two stretches is that of the first,
moved on by the length of the second, exclusive-or that of the second.

References:
    RFC 3720, appendix B.4; the masking is that of LevelDB's log format.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint32]

_POLYNOMIAL = 0x82F63B78
_MOST_STRETCHES = 1 << 16
_SHORTEST_BYTES = 64


def _table() -> Words:
    words = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        words = (words >> 1) ^ np.where(words & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return words.astype(np.uint32)


_TABLE = _table()


def crc32c(data: bytes | memoryview) -> int:
    """The checksum of all of ``data``."""
    values = np.frombuffer(data, np.uint8)
    stretches = 1
    while stretches < _MOST_STRETCHES and stretches * 2 * _SHORTEST_BYTES <= len(values):
        stretches *= 2
    length = len(values) // stretches
    table = values[: stretches * length].reshape(stretches, length)
    words = np.zeros(stretches, np.uint32)
    words[0] = 0xFFFFFFFF
    for n in range(length):
        words = _TABLE[(words ^ table[:, n]) & 255] ^ (words >> 8)
    moved = _moved(length)
    while len(words) > 1:
        words = _apply(moved, words[::2]) ^ words[1::2]
        moved = _apply(moved, moved)
    word = int(words[0])
    for value in values[stretches * length :].tolist():
        word = int(_TABLE[(word ^ value) & 255]) ^ (word >> 8)
    return word ^ 0xFFFFFFFF


def masked(checksum: int) -> int:
    """As it is stored beside data that may hold checksums itself."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _moved(count: int) -> Words:
    """What becomes of each bit of the register after so many zero bytes."""
    found = np.uint32(1) << np.arange(32, dtype=np.uint32)
    square = _TABLE[found & 255] ^ (found >> 8)
    while count:
        if count & 1:
            found = _apply(square, found)
        square = _apply(square, square)
        count >>= 1
    return found


def _apply(moved: Words, words: Words) -> Words:
    out = np.zeros_like(words)
    for bit in range(32):
        out ^= np.where((words >> np.uint32(bit)) & 1, moved[bit], np.uint32(0))
    return out
