"""Any part of a file of a checkpoint, verified by itself: block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from actckpt.checkpoint.digest import BLOCK_BYTES, BLOCK_DIGEST_BYTES, digest_of_block
from actckpt.checkpoint.files import Files, Source
from actckpt.checkpoint.manifest import FileEntry
from actckpt.checkpoint.verification import check_source, opened
from actckpt.errors import CheckpointFormatError


class VerifiedFile:
    """A file of which parts are read.

    Args:
        blocks: the digests of its blocks.
        held: by number, blocks that have been read elsewhere; verified here all the same.

    Attributes:
        read_bytes: where `read` goes on.
        fetched_bytes: what was read from storage, for whatever was asked.
    """

    def __init__(
        self,
        source: Source,
        where: str,
        blocks: bytes,
        held: Mapping[int, memoryview] | None = None,
    ) -> None:
        self._elsewhere = held or {}
        self._source = source
        self._where = where
        self._blocks = blocks
        self._held: tuple[int, memoryview] | None = None
        self.size_bytes = source.size_bytes
        self.read_bytes = 0
        self.fetched_bytes = 0

    def read(self, count: int) -> bytearray:
        """The next ``count`` bytes.

        Raises:
            EOFError: there are fewer.
            CheckpointFormatError: they are not what was written.
        """
        if count > self.size_bytes - self.read_bytes:
            raise EOFError(f"has {self.size_bytes} bytes, {self.read_bytes + count} were expected")
        buffer = bytearray(count)
        self.read_at(self.read_bytes, memoryview(buffer))
        self.read_bytes += count
        return buffer

    def read_at(self, offset: int, into: memoryview) -> None:
        """Fills ``into`` from a place of the file; at most a block more is fetched at either end.

        Raises:
            EOFError: the file ends before.
            CheckpointFormatError: they are not what was written.
        """
        view = into.cast("B")
        while view:
            number, within = divmod(offset, BLOCK_BYTES)
            size = min(BLOCK_BYTES, self.size_bytes - number * BLOCK_BYTES)
            if within == 0 and len(view) >= size and not self._holds(number):
                count = size
                self._fetch(number, view[:size])
            else:
                count = min(size - within, len(view))
                view[:count] = self._block(number, size)[within : within + count]
            view, offset = view[count:], offset + count

    def _holds(self, number: int) -> bool:
        return self._held is not None and self._held[0] == number

    def _block(self, number: int, size: int) -> memoryview:
        if self._held is None or self._held[0] != number:
            block = memoryview(bytearray(size))
            self._fetch(number, block)
            self._held = number, block
        return self._held[1]

    def _fetch(self, number: int, into: memoryview) -> None:
        begin = number * BLOCK_BYTES
        if number in self._elsewhere:
            into[:] = self._elsewhere[number]
        else:
            self._source.read_at(begin, into)
            self.fetched_bytes += len(into)
        at = number * BLOCK_DIGEST_BYTES
        if digest_of_block(into) != self._blocks[at : at + BLOCK_DIGEST_BYTES]:
            raise CheckpointFormatError(
                f"{self._where} is damaged: bytes {begin} to {begin + len(into)} are not those "
                "that were written; use another checkpoint, or restore this file from a copy"
            )


@contextmanager
def verified_file(
    files: Files,
    where: str,
    entry: FileEntry,
    blocks: bytes,
    held: Mapping[int, memoryview] | None = None,
) -> Iterator[VerifiedFile]:
    """A file of a checkpoint, open.

    Raises:
        CheckpointFormatError: it is missing, no regular file, of another size, or damaged where
            it was read.
        CheckpointError: it cannot be read for a reason that is not its own.
    """
    with opened(files, where) as source:
        check_source(source, where, entry)
        yield VerifiedFile(source, where, blocks, held)
