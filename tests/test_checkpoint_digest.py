"""A file's checksum is the same however it is computed, and another one for every other content."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import xxhash

from actckpt.checkpoint import digest, files
from actckpt.checkpoint.at_once import at_once
from actckpt.checkpoint.files import Files
from tests.system_calls import Call, Grudging, Watched, before

BLOCK = 4096
PIECE = 1024


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(files, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(files, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(files, "WRITE_BACK_BYTES", 3 * PIECE)


def defined(content: bytes) -> str:
    """As the format says."""
    blocks = (content[at : at + BLOCK] for at in range(0, len(content), BLOCK))
    digests = b"".join(xxhash.xxh3_128_digest(block) for block in blocks)
    return f"xxh3-128-of-4MiB:{xxhash.xxh3_128_hexdigest(digests)}"


SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK, 7 * BLOCK + 999)


def drained(path: Path, first: int = 0, over: Files | None = None) -> str:
    """The checksum of a file of which so many bytes are read in order, and the rest is drained."""
    with (over or Files()).reading(str(path)) as source:
        source.read(first)
        source.drain()
        assert source.read_bytes == source.size_bytes
        return source.checksum


@pytest.mark.parametrize("size", SIZES)
def test_in_order_or_block_by_block(size: int, tmp_path: Path) -> None:
    content = random.Random(size).randbytes(size)
    path = tmp_path / "file"
    calls = Watched()
    with Files(calls).writing(str(path)) as sink:
        for begin in range(0, size, 1500):
            sink.write(content[begin : begin + 1500])
    assert sink.checksum == defined(content)
    assert path.read_bytes() == content
    for first in {0, min(8, size), min(BLOCK + 8, size), size}:
        assert drained(path, first) == defined(content)


def test_what_is_written_is_sent_on_its_way_once(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def note(call: Call) -> None:
        if call.name == "write_back":
            asked.append(call.args[1:])

    with Files(Watched(before(note))).writing(str(tmp_path / "file")) as sink:
        for _ in range(10):
            sink.write(b"x" * 1000)
    ends = [offset + count for offset, count in asked]
    assert [offset for offset, _ in asked] == [0, *ends[:-1]]
    assert 7000 < ends[-1] <= 10000


def test_every_block_counts(tmp_path: Path) -> None:
    content = bytearray(random.Random(0).randbytes(6 * BLOCK + 10))
    path = tmp_path / "file"
    path.write_bytes(content)
    whole = drained(path)
    for at in (*range(5, len(content), BLOCK), len(content) - 1):
        content[at] ^= 4
        path.write_bytes(content)
        assert drained(path) != whole
        content[at] ^= 4
    swapped = content[BLOCK : 2 * BLOCK] + content[:BLOCK] + content[2 * BLOCK :]
    path.write_bytes(swapped)
    assert drained(path) != whole


def test_readers_are_interrupted_and_read_less(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(6 * BLOCK + 10)
    path = tmp_path / "file"
    path.write_bytes(content)
    assert drained(path, over=Files(Watched(Grudging()))) == defined(content)


def test_an_error_of_one_reader_is_raised(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(6 * BLOCK))

    def fail(call: Call) -> None:
        if call.name == "readinto" and call.args[2] == 3 * BLOCK + PIECE:
            raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        drained(path, over=Files(Watched(before(fail))))


def test_a_file_that_becomes_shorter_is_no_endless_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(6 * BLOCK))

    def cut(call: Call) -> None:
        if call.name == "readinto":
            with open(path, "r+b") as file:
                file.truncate(4 * BLOCK + 7)

    with pytest.raises(EOFError, match=r"ends before byte \d+"):
        drained(path, over=Files(Watched(before(cut))))


def test_shares_that_no_thread_can_take_are_done_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def work(share: int) -> int:
        if share < 0:
            raise ValueError(f"share {share}")
        return share * 10

    assert at_once(work, [1, 2, 3]) == [10, 20, 30]
    with pytest.raises(ValueError, match="share -2"):
        at_once(work, [1, -2, 3, -4])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert at_once(work, [1, 2, 3]) == [10, 20, 30]


def test_a_large_save_is_read_back_while_the_interpreter_exits(tmp_path: Path) -> None:
    code = (
        "import sys, torch, actckpt\n"
        "model = torch.nn.Linear(2048, 2048)\n"
        "actckpt.Checkpointer(sys.argv[1], model=model).save(wait=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert os.listdir(tmp_path / "step-00000000") != []
    assert "not saved" not in done.stderr
