"""Whatever happens to the files is seen, and the message names the file."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actckpt.checkpoint.commit import commit
from actckpt.checkpoint.digest import Digest
from actckpt.checkpoint.discovery import discover
from actckpt.checkpoint.documents import sealed
from actckpt.checkpoint.encoding import encode
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.reading import read_state
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.checkpoint.verification import verify_files
from actckpt.errors import CheckpointFormatError

FILES = ("manifest.json", "state.json", "model.safetensors", "optimizer.safetensors")
MODEL = "model.safetensors"
# `make faults` looks longer
WHOLE = os.environ.get("ACTCKPT_FAULTS") == "whole"


def make(directory: Path, step: int = 1, serial: int = 1) -> Path:
    """A small checkpoint of two items."""
    g = torch.Generator().manual_seed(step)
    state = {
        "model": {"a": torch.randn(50, 3, generator=g), "b": torch.zeros(7, dtype=torch.int8)},
        "optimizer": {"state": {0: {"m": torch.randn(50, 3, generator=g)}}, "lr": 0.1 * step},
    }
    items = {name: encode(value, name) for name, value in state.items()}
    snapshot = Snapshot(step, items, "", {"loss": 0.5}, "", {"torch": "x"})
    return commit(Files(), str(directory), snapshot, serial=serial).path


def assert_seen(checkpoint: Path, file: str) -> None:
    """Verifying and reading both raise, and name the file."""
    for read in (verify_files, read_state):
        with pytest.raises(CheckpointFormatError) as found:
            read(Files(), str(checkpoint))
        assert file in str(found.value)
        assert str(checkpoint) in str(found.value)
        assert_helps(found.value)


def assert_helps(error: BaseException) -> None:
    """The message says what to do."""
    assert re.search(r"[Uu]se (another checkpoint|the actckpt)|do not trust", str(error)), error


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make(tmp_path)


def test_sound_ones_verify(checkpoint: Path) -> None:
    manifest = verify_files(Files(), str(checkpoint))
    assert {*manifest.files, "manifest.json"} == set(FILES) == set(os.listdir(checkpoint))
    assert verify_files(Files(), str(checkpoint), "manifest") == manifest


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere(file: str, checkpoint: Path) -> None:
    path = checkpoint / file
    sound = path.read_bytes()
    rng = random.Random(0)
    if WHOLE:
        spots = list(range(8 * len(sound)))
    else:  # where lengths and seals are, and others between
        ends = (*range(16), *range(len(sound) - 16, len(sound)))
        spots = [8 * i + b for i in ends for b in range(8)]
        spots += [rng.randrange(8 * len(sound)) for _ in range(100)]
    for spot in spots:
        damaged = bytearray(sound)
        damaged[spot // 8] ^= 1 << spot % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointFormatError, match=file.replace(".", r"\.")):
            read_state(Files(), str(checkpoint))
    assert_seen(checkpoint, file)
    path.write_bytes(sound)
    verify_files(Files(), str(checkpoint))


def _zero_page(data: bytes) -> bytes:
    return bytes(min(len(data), 4096)) + data[4096:]


def _swap_halves(data: bytes) -> bytes:
    half = len(data) // 2
    return data[half:] + data[:half]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "first byte only": lambda data: data[:1],
    "last byte missing": lambda data: data[:-1],
    "trailing byte": lambda data: data + b"\n",
    "page of zeros": _zero_page,
    "halves swapped": _swap_halves,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damages(file: str, damage: str, checkpoint: Path) -> None:
    path = checkpoint / file
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert_seen(checkpoint, file)


@pytest.mark.parametrize("file", FILES)
def test_files_that_are_missing_or_no_files(file: str, checkpoint: Path, tmp_path: Path) -> None:
    path, away = checkpoint / file, tmp_path / "away"
    path.rename(away)
    assert_seen(checkpoint, file)
    path.symlink_to(away)
    assert_seen(checkpoint, file)
    path.unlink()
    path.mkdir()
    assert_seen(checkpoint, file)
    path.rmdir()
    os.mkfifo(path)
    assert_seen(checkpoint, file)


@pytest.mark.parametrize("file", FILES[1:])
def test_files_of_another_checkpoint(file: str, checkpoint: Path, tmp_path: Path) -> None:
    other = make(tmp_path, step=2, serial=2)
    shutil.copy(other / file, checkpoint / file)
    assert_seen(checkpoint, file)


def test_two_files_swapped(checkpoint: Path) -> None:
    model, optimizer = checkpoint / FILES[2], checkpoint / FILES[3]
    model.rename(checkpoint / "x")
    optimizer.rename(model)
    (checkpoint / "x").rename(optimizer)
    assert_seen(checkpoint, MODEL)


# what a checksum does not protect from: files that were made to be read


def forge(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest with a valid seal and other content."""
    path = checkpoint / "manifest.json"
    data = json.loads(path.read_bytes())
    change(data)
    fields = {k: v for k, v in data.items() if k not in ("format", "format_version", "checksum")}
    path.write_bytes(sealed("manifest", data["format_version"], fields))


def replace_file(checkpoint: Path, file: str, content: bytes) -> None:
    """A file of other content that the manifest vouches for."""
    (checkpoint / file).write_bytes(content)
    digest = Digest()
    digest.update(memoryview(content))

    def change(data: dict[str, Any]) -> None:
        data["files"][file] = {"size_bytes": len(content), "checksum": digest.checksum}

    forge(checkpoint, change)


def test_a_forgery_is_read_where_it_is_true(checkpoint: Path) -> None:
    forge(checkpoint, lambda data: data["metrics"].update(loss=0.25))
    replace_file(checkpoint, MODEL, (checkpoint / MODEL).read_bytes())
    assert read_state(Files(), str(checkpoint))[0].metrics == {"loss": 0.25}


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.json", "..", "", "\0.json", ".hidden.json"]
)
def test_a_manifest_cannot_name_files_elsewhere(name: str, checkpoint: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["files"][name] = data["files"][MODEL]

    forge(checkpoint, change)
    with pytest.raises(CheckpointFormatError, match="no plain name") as found:
        read_state(Files(), str(checkpoint))
    assert_helps(found.value)


def _reshape(data: dict[str, Any], shape: Any) -> None:
    entry = data["tensors"]["model/a"]
    entry["shape"] = entry["chunks"][0]["shape"] = shape
    entry["chunks"][0]["offset"] = [0] * len(shape)


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "huge shape": lambda d: _reshape(d, [2**40, 2**20]),
    "shape beyond 64 bits": lambda d: _reshape(d, [2**80]),
    "negative shape": lambda d: _reshape(d, [-50, -3]),
    "no integer": lambda d: _reshape(d, [50.0, 3]),
    "true for one": lambda d: _reshape(d, [150, True]),
    "thousand dimensions": lambda d: _reshape(d, [1] * 1000),
    "another shape": lambda d: _reshape(d, [3, 50]),
    "unknown dtype": lambda d: d["tensors"]["model/a"].update(dtype="float1000"),
    "dtype that is no dtype": lambda d: d["tensors"]["model/a"].update(dtype="nn"),
    "no chunks": lambda d: d["tensors"]["model/a"].update(chunks=[]),
    "chunk twice": lambda d: d["tensors"]["model/a"]["chunks"].append(
        d["tensors"]["model/a"]["chunks"][0]
    ),
    "chunk elsewhere": lambda d: d["tensors"]["model/a"]["chunks"][0].update(file="none.json"),
    "tensor missing": lambda d: d["tensors"].pop("model/a"),
    "tensor of no item": lambda d: d["tensors"].update({"x/a": d["tensors"].pop("model/a")}),
    "tensors a list": lambda d: d.update(tensors=[]),
    "step a text": lambda d: d.update(step="1"),
    "no files": lambda d: d.pop("files"),
    "state not listed": lambda d: d["files"].pop("state.json"),
    "size a lie": lambda d: d["files"][MODEL].update(size_bytes=2**47),
    "other checksum": lambda d: d["files"][MODEL].update(checksum="md5:0"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_manifests_that_describe_nothing(forgery: str, checkpoint: Path) -> None:
    forge(checkpoint, FORGERIES[forgery])
    with pytest.raises(CheckpointFormatError, match="step-00000001") as found:
        read_state(Files(), str(checkpoint))
    assert_helps(found.value)


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(shape: Any, begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    """An entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, bytes] = {
    "shorter than its length": b"\x01\x00",
    "length beyond the file": header({}, length=2**63),
    "length above the limit": header(b"{}" + b" " * 10, length=100_000_001),
    "no JSON": header(b"\x80\x04K\x01."),
    "a list": header([]),
    "deep": header(b"[" * 100_000 + b"]" * 100_000),
    "a member twice": header(b'{"a":1,"a":2}'),
    "NaN": header(b'{"a":NaN}'),
    "hole": header({"a": tensor([1], 4, 8)}, bytes(8)),
    "overlap": header({"a": tensor([1], 0, 4), "b": tensor([1], 2, 6)}, bytes(6)),
    "behind the end": header({"a": tensor([2], 0, 8)}, bytes(4)),
    "left over": header({"a": tensor([1], 0, 4)}, bytes(8)),
    "shape and size differ": header({"a": tensor([2], 0, 4)}, bytes(4)),
    "product overflows": header({"a": tensor([2**32, 2**32], 0, 0)}),
    "huge beside zero": header({"a": tensor([2**62, 0], 0, 0)}),
    "negative": header({"a": tensor([-1, -1], 0, 4)}, bytes(4)),
    "unknown dtype": header({"a": tensor([1], 0, 4, "F33")}, bytes(4)),
    "no offsets": header({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "other tensors": header({"c": tensor([1], 0, 4)}, bytes(4)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_absurd_headers(name: str, checkpoint: Path) -> None:
    replace_file(checkpoint, MODEL, HEADERS[name])
    assert_seen(checkpoint, MODEL)


STATES: dict[str, bytes] = {
    "unknown tag": b'{"format":"actckpt.state","format_version":1,"items":{"model":{"$new":1}}}',
    "no tensor of that name": b'{"format":"actckpt.state","format_version":1,'
    b'"items":{"model":{"$tensor":"z"},"optimizer":1}}',
    "object dtype": b'{"format":"actckpt.state","format_version":1,"items":{"model":'
    b'{"$scalar":"gASVAAAAAA==","dtype":"|O"},"optimizer":1}}',
    "stride with gaps": b'{"format":"actckpt.state","format_version":1,"items":{"model":'
    b'{"$tensor":"a","stride":[1000000000000,1]},"optimizer":1}}',
    "another version": b'{"format":"actckpt.state","format_version":2,"items":{}}',
    "another format": b'{"format":"other"}',
    "no items": b'{"format":"actckpt.state","format_version":1}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_describe_nothing(name: str, checkpoint: Path) -> None:
    replace_file(checkpoint, "state.json", STATES[name])
    with pytest.raises(CheckpointFormatError, match=r"state\.json") as found:
        read_state(Files(), str(checkpoint))
    assert_helps(found.value)


def test_another_format_version_is_told_from_damage(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    data = json.loads(path.read_bytes())
    path.write_bytes(sealed("manifest", 5, {"anything": data["step"]}))
    with pytest.raises(CheckpointFormatError, match="version 5; this actckpt reads"):
        read_state(Files(), str(checkpoint))
    path.write_bytes(b'{\n "format": "actckpt.manifest",\n "format_version": 4,\n "new": 1}')
    with pytest.raises(
        CheckpointFormatError, match="version 4; this actckpt reads version 1 and 2 and 3"
    ):
        read_state(Files(), str(checkpoint))


# pickle


class Bomb:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("bomb",)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("vouched", [False, True])
def test_a_pickle_under_any_name_is_never_loaded(
    file: str, vouched: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was loaded")

    torch.save(Bomb(), checkpoint / "torch.pt")
    zipped = (checkpoint / "torch.pt").read_bytes()
    for content in (pickle.dumps(Bomb()), zipped):
        for owner, name in (
            (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, reached)
        monkeypatch.chdir(checkpoint.parent)
        if vouched and file != "manifest.json":
            replace_file(checkpoint, file, content)
        else:
            (checkpoint / file).write_bytes(content)
        assert_seen(checkpoint, file)
        assert not (checkpoint.parent / "bomb").exists()


# directories


def test_discovery_says_why_an_entry_does_not_count(tmp_path: Path) -> None:
    first, second = make(tmp_path, 1, 1), make(tmp_path, 2, 2)
    third = make(tmp_path, 3, 3)
    (second / "manifest.json").write_bytes(b"{}")
    (tmp_path / "step-00000004").symlink_to(third)
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000006").write_text("a file")
    (tmp_path / ".saving-step-00000007-1-a").mkdir()
    (tmp_path / "step-7").mkdir()
    (tmp_path / "notes.txt").write_text("the user's own")
    found = discover(Files(), str(tmp_path))
    assert [c.path for c in found.checkpoints] == [third, first]
    reasons = {s.name: s.reason for s in found.skipped}
    assert sorted(reasons) == [f"step-0000000{n}" for n in (2, 4, 5, 6)]
    assert all(f"{tmp_path}/{name}" in reason for name, reason in reasons.items())


def test_newest_is_what_was_saved_last(tmp_path: Path) -> None:
    made = [make(tmp_path, step, serial) for serial, step in enumerate((10, 20, 12, 12))]
    assert made[3].name == "step-00000012.1"
    found = discover(Files(), str(tmp_path))
    assert [c.path for c in found.checkpoints] == made[::-1]
