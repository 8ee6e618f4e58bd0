"""Ranks that read one checkpoint read every byte of it once, and nobody waits for who does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from actckpt.checkpoint.digest import BLOCK_BYTES
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import Manifest
from actckpt.checkpoint.system_calls import OperatingSystem
from actckpt.checkpoint.verification import read_manifest
from actckpt.errors import CheckpointError, CheckpointFormatError
from actckpt.sharded import reading_once
from actckpt.sharded.loading import ShareReading
from actckpt.sharded.passing import Parcel, UnreadError
from actckpt.sharded.reading_once import ReadingOnce
from actckpt.sharded.spans import shared_blocks, spans_of
from actckpt.sharded.waiting import Patience, RankSilentError
from tests.fleet import Fleet, Items, Post, encoded, rows
from tests.ranked import ENVIRONMENT, ROOT

WORLD = 3
# blocks of the file of one rank, and a part of another
LARGE = torch.arange(WORLD * BLOCK_BYTES * 5 // 4 // 8).reshape(6, -1)
SMALL = {f"x{n}": torch.full((n,), float(n)) for n in range(1, 20)}


class Counting(OperatingSystem):
    """Counts what is read."""

    def __init__(self) -> None:
        self.read_bytes = 0

    def readinto(self, fd: int, buffer: memoryview, offset: int) -> int:
        count = super().readinto(fd, buffer, offset)
        self.read_bytes += count
        return count


def items(rank: int) -> Items:
    """A large tensor in parts, small ones that one of them writes, and what is each one's own."""
    cut = {"large": rows(LARGE, rank, WORLD)}
    own = {"torch": torch.tensor([rank])}
    return {"model": encoded(SMALL, cut), "random": encoded(own, rank=rank)}


class Reading:
    """A checkpoint of three ranks, and such as read it."""

    def __init__(self, folder: Path, post: Post) -> None:
        writers = Fleet(folder, WORLD)
        made = writers.save(1, items)
        self.directory = str(made[0].path)  # type: ignore[union-attr]
        self.size_bytes = read_manifest(Files(), self.directory).size_bytes
        self.post = post
        self.fleet = Fleet(folder, WORLD, patience=Patience(5.0, 60.0))
        self.calls = [Counting() for _ in range(WORLD)]
        self._number = 0

    def read(self, rank: int) -> dict[str, Any]:
        """What a rank reads."""
        self.post.of(rank)
        files, exchange = Files(self.calls[rank]), self.fleet.exchanges[rank]
        once = ReadingOnce(files, self.directory, exchange, f"reading/{self._number}", "resume()")
        with once.together():
            manifest: Manifest = read_manifest(files, self.directory)
            found = ShareReading(
                files,
                self.directory,
                manifest,
                rank=rank,
                like=lambda *_: None,
                same_world=True,
                once=once,
            ).items()
        assert once.rounds == 6
        assert not any(once.held.values())
        return found

    def all(self) -> dict[int, Any]:
        """What every rank reads, or raises."""
        self._number += 1
        return self.fleet.each(self.read)

    def check(self, found: dict[int, Any]) -> None:
        """That it is what was saved."""
        for rank, read in found.items():
            assert not isinstance(read, Exception), (rank, read)
            assert torch.equal(read["model"]["large"], LARGE)
            assert all(torch.equal(read["model"][k], x) for k, x in SMALL.items())
            assert read["random"]["torch"].tolist() == [rank]
            assert read["random"]["rank"] == rank


@pytest.fixture
def reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reading:
    post = Post()
    monkeypatch.setattr(reading_once, "passed", post.passed)
    return Reading(tmp_path, post)


def test_every_byte_is_read_once(reading: Reading) -> None:
    reading.check(reading.all())
    assert sum(calls.read_bytes for calls in reading.calls) <= 1.05 * reading.size_bytes
    # they take turns
    assert max(calls.read_bytes for calls in reading.calls) < 0.6 * reading.size_bytes
    told = [e._told for e in reading.fleet.exchanges.values()]
    assert all("reading/1/" in key for keys in told for key in keys)


def test_a_block_that_is_damaged_is_named_by_its_reader(reading: Reading) -> None:
    for path in sorted(Path(reading.directory).iterdir()):
        if path.name == "manifest.json":
            continue
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        found = reading.all()
        path.write_bytes(data)
        kinds = {type(error) for error in found.values()}
        assert kinds <= {CheckpointFormatError, UnreadError}, (path, found)
        said = [str(e) for e in found.values() if type(e) is CheckpointFormatError]
        assert said
        assert all(path.name in text for text in said)
    reading.check(reading.all())


def test_what_one_rank_cannot_read_now_is_said_by_it_alone(reading: Reading) -> None:
    def broken(fd: int, buffer: memoryview, offset: int) -> int:
        if offset >= BLOCK_BYTES:
            raise OSError(110, "timed out")
        return OperatingSystem.readinto(reading.calls[1], fd, buffer, offset)

    reading.calls[1].readinto = broken  # type: ignore[method-assign]
    found = reading.all()
    assert type(found[1]) is CheckpointError
    assert "timed out" in str(found[1])
    assert type(found[0]) is type(found[2]) is UnreadError


def changed(source: int, to: int, data: bytes) -> bytes:
    """A bit of what the last rank gets."""
    if to == WORLD - 1 and len(data) > BLOCK_BYTES:
        return data[:1000] + bytes([data[1000] ^ 4]) + data[1001:]
    return data


def test_what_is_changed_on_its_way_is_no_damage(reading: Reading) -> None:
    reading.post.changes = changed
    found = reading.all()
    assert type(found[2]) is CheckpointError
    assert "came otherwise than rank" in str(found[2])
    assert type(found[0]) is type(found[1]) is UnreadError
    reading.post.changes = lambda source, to, data: data
    reading.check(reading.all())


def test_nobody_checks_what_came(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests of the checkpoint find it all the same."""
    monkeypatch.setattr(Parcel, "check", lambda self, reader, what: None)
    reading.post.changes = changed
    found = reading.all()
    assert type(found[2]) is CheckpointFormatError
    assert "is damaged" in str(found[2])


def test_a_reader_that_ends_is_not_waited_for(reading: Reading) -> None:
    class Ended(BaseException):
        pass

    read = reading.read

    def ending(rank: int) -> Any:
        if rank != 1:
            return read(rank)

        # it beats, has said what it wants, and ends in the middle of what it sends
        def dies(source: int, to: int, data: bytes) -> bytes:
            if source == 1 and len(data) > BLOCK_BYTES:
                reading.fleet.exchanges[1].end()
                raise Ended
            return data

        reading.post.changes = dies
        try:
            return read(rank)
        except Ended:
            return "ended"

    reading.read = ending  # type: ignore[method-assign]
    found = reading.all()
    assert found[1] == "ended"
    assert type(found[0]) is type(found[2]) is RankSilentError
    assert "was not heard of" in str(found[0])


def test_blocks_and_their_readers() -> None:
    assert spans_of({5, 1, 2, 3, 9}) == [(1, 4), (5, 6), (9, 10)]
    wanted = [{"b": [(0, 4)], "a": [(1, 2)]}, {"b": [(2, 6)]}, {"b": [(3, 5)], "a": [(0, 1)]}]
    found = [(b.file, b.number, b.ranks) for b in shared_blocks(wanted)]
    assert found == [("b", 2, (0, 1)), ("b", 3, (0, 1, 2)), ("b", 4, (1, 2))]
    everything = [{"x": [(0, 10)]}] * 4
    assert [b.reader for b in shared_blocks(everything)] == [n % 4 for n in range(10)]
    heads = [{f"file-{n}": [(0, 1)] for n in range(6)}] * 3
    assert [b.reader for b in shared_blocks(heads)] == [0, 1, 2, 0, 1, 2]


def test_a_reader_that_is_killed_or_stopped_is_not_waited_for() -> None:
    """Over gloo, whose own time-out is 15 minutes."""
    command = [sys.executable, "-m", "tests.faults.reading"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "2 faults, 0 violations" in done.stdout
