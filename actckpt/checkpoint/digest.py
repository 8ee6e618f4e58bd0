"""Checksums: of a document in one piece, of a file block by block.

Blocks can be hashed apart from one another, so a file is read back on several cores at once.

References:
    xxHash, XXH3 128 bits: https://github.com/Cyan4973/xxHash. No cryptographic hash: it finds
    damage, not malice.
"""

from __future__ import annotations

import xxhash

# of a document
CHECKSUM = "xxh3-128"
# of a file: xxh3-128 of the xxh3-128 digests, 16 bytes each, of every 4 MiB
FILE_CHECKSUM = "xxh3-128-of-4MiB"
BLOCK_BYTES = 1 << 22
BLOCK_DIGEST_BYTES = 16


def checksum_of(data: bytes | memoryview) -> str:
    """Of a document."""
    return f"{CHECKSUM}:{xxhash.xxh3_128_hexdigest(data)}"


class Digest:
    """The checksum of a file, of its bytes in order or of whole blocks hashed elsewhere."""

    def __init__(self) -> None:
        self._blocks = bytearray()
        self._begin_block()

    def _begin_block(self) -> None:
        self._block = xxhash.xxh3_128()
        self.missing_bytes = BLOCK_BYTES

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        while data:
            part = data[: self.missing_bytes]
            self._block.update(part)
            self.missing_bytes -= len(part)
            if not self.missing_bytes:
                self._blocks += self._block.digest()
                self._begin_block()
            data = data[len(part) :]

    def append(self, block: bytes) -> None:
        """The digest of the next whole block; none may be begun."""
        self._blocks += block

    @property
    def blocks(self) -> bytes:
        """The digests of every block so far, `BLOCK_DIGEST_BYTES` each."""
        begun = self._block.digest() if self.missing_bytes < BLOCK_BYTES else b""
        return bytes(self._blocks + begun)

    @property
    def checksum(self) -> str:
        """Of everything so far."""
        return checksum_of_blocks(self.blocks)


def checksum_of_blocks(blocks: bytes) -> str:
    """Of a file, by the digests of its blocks."""
    return f"{FILE_CHECKSUM}:{xxhash.xxh3_128_hexdigest(blocks)}"


def digest_of_block(data: bytes | memoryview) -> bytes:
    """Of one block."""
    return bytes(xxhash.xxh3_128_digest(data))
