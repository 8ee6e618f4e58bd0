"""Files of a checkpoint, of which every block is read from storage by one rank and sent to others.

Ranks go through rounds. In each of them every rank says which blocks it needs next (one gathering
over the store), or that it cannot go on; then those that several need are passed on, a few at a
time, from the rank that reads them. What only one rank needs it reads for itself.

No collective of the process group. What all ranks do to load one checkpoint of many ranks are six
gatherings: for the manifests, the plain data, the heads of the files, what of them is beyond a
block, the tensors, and the end; of one process, one for each file, and the end. Beside these there
are messages from the rank that reads to those that need it too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from actckpt.checkpoint.digest import BLOCK_BYTES
from actckpt.checkpoint.files import Files, Source
from actckpt.checkpoint.manifest import FileEntry
from actckpt.checkpoint.verification import check_source, opened
from actckpt.errors import CheckpointError
from actckpt.sharded.exchange import Exchange
from actckpt.sharded.passing import Parcel, UnreadError, Watch, passed
from actckpt.sharded.spans import Shared, Spans, shared_blocks, spans_of

SAME = "every rank has to be given the same directory, on a file system that all of them share"
# so many blocks are under way at once
_AT_ONCE = 16


class ReadingOnce:
    """One reading of one checkpoint, by all ranks.

    Args:
        place: under which ranks say what they read, the same on each; of no other reading.
        call: of the user's, in which they read.

    Attributes:
        of: what tells the checkpoint from every other, once this rank knows.
        fetched_bytes: what this rank read from storage.
        rounds: how many there were so far.
    """

    def __init__(
        self, files: Files, directory: str, exchange: Exchange, place: str, call: str
    ) -> None:
        self._files, self._directory, self._exchange = files, directory, exchange
        self._place, self._call = place, call
        self.of = ""
        self._watch = Watch(exchange, f"{self._place}/left")
        self._ended = False
        self.fetched_bytes = 0
        self.rounds = 0
        # by file and number, what has come and was not yet used up
        self.held: dict[str, dict[int, memoryview]] = {}

    def round(
        self,
        wanted: Mapping[str, set[int]],
        entries: Mapping[str, FileEntry],
        arrived: Callable[[str, int], None] | None = None,
    ) -> None:
        """Blocks that are needed next, in `held`.

        Args:
            wanted: by file, numbers of blocks.
            entries: of these files at least.
            arrived: called after some of what several ranks want has come, with file and number of
                the last; what only this one wants is left to it. None: it is read all the same.

        Raises:
            UnreadError: another rank says what went wrong.
            CheckpointError: it could not be read, or sent.
        """
        here: Spans = {file: spans_of(numbers) for file, numbers in wanted.items() if numbers}
        said = self._gather({"wanted": here})
        blocks = shared_blocks([s["wanted"] for s in said])
        error: Exception | None = None
        while window := [*islice(blocks, _AT_ONCE)]:
            found = self._window(window, entries, error is None)
            error = error or found
            if error is None and arrived is not None:
                try:
                    arrived(window[-1].file, window[-1].number)
                # the others wait for what this one is still to send
                except Exception as raised:
                    error = raised
        if error is not None:
            raise error
        if arrived is None:
            self._read_alone(wanted, entries)

    def _read_alone(self, wanted: Mapping[str, set[int]], entries: Mapping[str, FileEntry]) -> None:
        for file, numbers in wanted.items():
            held = self.held.setdefault(file, {})
            for number in numbers - held.keys():
                block = memoryview(bytearray(_size(entries[file], number)))
                self._read(file, number, entries[file], block)
                held[number] = block

    def forget(self) -> None:
        """Every rank has come to the end of this."""
        self._exchange.forget(f"{self._place}/")

    @contextmanager
    def together(self) -> Iterator[None]:
        """All that ranks do of this; what stops one of them stops all."""
        try:
            yield
            self._gather({"wanted": {}})
            self._ended = True
        except BaseException:  # Ctrl-C as well: the process may live on
            if not self._ended:
                self._ended = True
                # others may wait for what this one was to say next, or to send
                self._exchange.tell_all(self._key(), {"failed": True})
            raise

    def _key(self) -> str:
        return f"{self._place}/round/{self.rounds}"

    def _gather(self, message: dict[str, Any]) -> list[Any]:
        self._exchange.begin()
        try:
            said = self._exchange.calls.gather_at(
                self._key(), self._call, {"of": self.of, **message}
            )
        except CheckpointError:
            self._ended = True
            raise
        self.rounds += 1
        failed = [rank for rank, s in enumerate(said) if "failed" in s]
        if failed:
            self._ended = True
            raise UnreadError(f"rank {failed[0]} could not go on")
        if other := different([s["of"] for s in said]):
            self._ended = True
            raise CheckpointError(other)
        return said

    def _window(
        self, window: list[Shared], entries: Mapping[str, FileEntry], reads: bool
    ) -> Exception | None:
        """Passes a few blocks on; what went wrong, once all that others wait for is sent."""
        me = self._exchange.rank
        error: Exception | None = None
        mine = [b for b in window if me in b.ranks]
        parcels = [Parcel(_size(entries[b.file], b.number)) for b in mine]
        for block, parcel in zip(mine, parcels, strict=True):
            if block.reader == me and reads and error is None:
                try:
                    self._read(block.file, block.number, entries[block.file], parcel.block)
                    parcel.seal()
                except Exception as raised:
                    error = raised
        pairs = [*zip(mine, parcels, strict=True)]
        sends = [(p, rank) for b, p in pairs if b.reader == me for rank in b.ranks if rank != me]
        receives = [(p, b.reader) for b, p in pairs if b.reader != me]
        try:
            passed(sends, receives, self._watch)
        except Exception as broken:
            # no further message can be told from this one's
            self._ended = True
            self._watch.leave(broken)
            raise
        for block, parcel in pairs:
            if error is None and block.reader != me:
                try:
                    what = f"block {block.number} of {self._directory}/{block.file}"
                    parcel.check(block.reader, what)
                except CheckpointError as raised:
                    error = raised
        if error is None:
            for block, parcel in pairs:
                self.held.setdefault(block.file, {})[block.number] = parcel.block
        return error

    def _read(self, file: str, number: int, entry: FileEntry, into: memoryview) -> None:
        where = f"{self._directory}/{file}"
        with opened(self._files, where) as source:
            check_source(source, where, entry)
            source.read_at(number * BLOCK_BYTES, into)
        self.fetched_bytes += len(into)


class FilesOnce(Files):
    """Files of a checkpoint that ranks read whole.

    Args:
        entries: of files that all ranks read, one after another in one and the same order.
    """

    def __init__(
        self, files: Files, reading: ReadingOnce, entries: Mapping[str, FileEntry] | None = None
    ) -> None:
        super().__init__(files.calls)
        self._plain, self._reading = files, reading
        self._entries = dict(entries or {})

    def fetch(self, names: Collection[str], entries: Mapping[str, FileEntry]) -> None:
        """Reads files that are opened next; every rank has to come to this, for whichever."""
        wanted = {name: {*range(_count(entries[name]))} for name in names}
        self._reading.round(wanted, entries)

    @contextmanager
    def reading(self, path: str) -> Iterator[Source]:
        """As `Files.reading`; of what was not fetched, every rank has to come to this."""
        name = path.rpartition("/")[2]
        if name in self._entries and name not in self._reading.held:
            self.fetch([name], self._entries)
        held = self._reading.held.pop(name, None)
        if held is None:
            with self._plain.reading(path) as source:
                yield source
            return
        calls: Any = _Held(held)
        yield Source(calls, -1, sum(map(len, held.values())))


class _Held:
    """What `Source` asks of the system's calls, of blocks in memory."""

    def __init__(self, blocks: Mapping[int, memoryview]) -> None:
        self._blocks = blocks

    def readinto(self, fd: int, into: memoryview, offset: int) -> int:
        """As `SystemCalls.readinto`."""
        number, within = divmod(offset, BLOCK_BYTES)
        if number not in self._blocks:
            return 0
        found = self._blocks[number][within : within + len(into)]
        into[: len(found)] = found
        return len(found)


def different(saves: Sequence[str]) -> str:
    """Why ranks cannot read checkpoints together that are of different saves; "" if they are not.

    Args:
        saves: by rank; "" of one that does not know.
    """
    known = {rank: save for rank, save in enumerate(saves) if save}
    first = next(iter(known), 0)
    for rank, save in known.items():
        if save != known[first]:
            return f"it is another checkpoint on rank {rank} than on rank {first}: {SAME}"
    return ""


def _count(entry: FileEntry) -> int:
    return -(-entry.size_bytes // BLOCK_BYTES)


def _size(entry: FileEntry, number: int) -> int:
    return min(BLOCK_BYTES, entry.size_bytes - number * BLOCK_BYTES)
