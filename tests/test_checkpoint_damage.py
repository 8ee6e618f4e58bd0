"""Large files and random damage: what is read is what was written, or nothing is."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actckpt.checkpoint.commit import commit
from actckpt.checkpoint.encoding import encode
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.reading import read_state
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.errors import CheckpointFormatError
from tests.test_checkpoint_corruption import MODEL, WHOLE, assert_seen, forge, make, replace_file
from tests.test_checkpoint_encoding import same, states

EXAMPLES = 2000 if WHOLE else 60


@pytest.mark.parametrize("page", [0, 1, 100, 255])
def test_a_page_of_zeros_in_the_middle_of_a_larger_file(page: int, tmp_path: Path) -> None:
    items = {"model": encode({"a": torch.randn(512, 512)}, "model")}
    snapshot = Snapshot(1, items, "", {}, "", {})
    made = commit(Files(), str(tmp_path), snapshot, serial=1)
    made.verify()
    path = made.path
    with open(path / MODEL, "r+b") as file:
        file.seek(4096 * page)
        assert file.read(4096).strip(b"\0")
        file.seek(4096 * page)
        file.write(bytes(4096))
    assert_seen(path, MODEL)
    with pytest.raises(CheckpointFormatError, match=MODEL):
        made.verify()


@pytest.mark.parametrize("over", [0, 1])
def test_a_header_of_a_hundred_million_bytes(over: int, tmp_path: Path) -> None:
    path = make(tmp_path)
    length = 100_000_000 + over
    content = length.to_bytes(8, "little") + b"{" + b" " * (length - 2) + b"}"
    replace_file(path, MODEL, content)
    del content
    tracemalloc.start()
    try:
        assert_seen(path, MODEL)
        # a longer one is not even looked at
        assert (tracemalloc.get_traced_memory()[1] < 10e6) == bool(over)
    finally:
        tracemalloc.stop()


def test_a_manifest_above_its_limit_is_not_read(tmp_path: Path) -> None:
    path = make(tmp_path)
    with open(path / "manifest.json", "ab") as file:
        file.truncate(256_000_001)
    assert_seen(path, "manifest.json")


def test_a_size_that_the_manifest_lies_about_is_not_allocated(tmp_path: Path) -> None:
    path = make(tmp_path)
    forge(path, lambda data: data["files"]["state.json"].update(size_bytes=2**40))
    assert_seen(path, "state.json")


damages = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("overwrite"), st.floats(0, 1), st.binary(min_size=1, max_size=600)),
    st.tuples(st.just("zero"), st.floats(0, 1), st.integers(1, 600)),
    st.tuples(st.just("remove"), st.floats(0, 1), st.integers(1, 600)),
)


def damaged(content: bytes, kind: str, where: float, what: Any) -> bytes:
    """Some bytes with one damage."""
    at = int(where * (len(content) - 1))
    head, tail = content[:at], content[at:]
    if kind == "flip":
        return head + bytes([tail[0] ^ 1 << what]) + tail[1:]
    if kind == "cut":
        return head
    if kind == "remove":
        return head + tail[what:]
    new = bytes(what)  # so many zeros, where it is a number
    return head + new + tail if kind == "insert" else head + (new + tail[len(new) :])[: len(tail)]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=states, file=st.integers(0), damage=damages)
def test_any_damage_to_any_state_is_seen(
    state: Any, file: int, damage: tuple[str, float, Any], tmp_path_factory: Any
) -> None:
    directory = tmp_path_factory.mktemp("run")
    items = {"one": encode(state, "one"), "two": encode([state, torch.ones(3)], "two")}
    path = commit(Files(), str(directory), Snapshot(1, items, "", {}, "", {}), serial=1).path
    names = sorted(os.listdir(path))
    victim = path / names[file % len(names)]
    sound = victim.read_bytes()
    victim.write_bytes(damaged(sound, *damage))
    if victim.read_bytes() == sound:
        assert same(read_state(Files(), str(path))[1]["one"], state)
    else:
        with pytest.raises(CheckpointFormatError) as found:
            read_state(Files(), str(path))
        assert str(victim) in str(found.value)
    shutil.rmtree(directory)
