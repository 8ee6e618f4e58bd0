"""An export that ends at any of its file system calls leaves nothing that looks like one."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import actckpt
from actckpt.checkpoint.files import Files
from actckpt.errors import WeightsExportError
from actckpt.exporting.folder import EXPORTING, verify_folder
from tests.system_calls import Around, Call, Make, Watched
from tests.travelling import TRAVELLERS

Model = Callable[[], nn.Module]
# of each a model, and how many calls lie between those that are tried
FORMATS = {
    "safetensors": ("own", 1),
    "huggingface": ("own", 1),
    "pt": ("own", 1),
    "gguf": ("llama", 3),
    "adapter": ("lora", 7),
}


class Killed(BaseException):
    """The process has ended: nothing that would run after it may reach the disk."""


def killed_at(number: int) -> Around:
    def around(call: Call, make: Make) -> Any:
        if call.number >= number:
            if call.name == "close":
                make(call)  # as the kernel does
            raise Killed
        return quickly(call, make)

    return around


def failing_at(number: int, code: int) -> Around:
    def around(call: Call, make: Make) -> Any:
        if call.number == number:
            if call.name == "close":
                make(call)
            raise OSError(code, os.strerror(code))
        return quickly(call, make)

    return around


def quickly(call: Call, make: Make) -> Any:
    """A disk that takes no time: what it has is not asked for here."""
    return None if call.name == "fsync" else make(call)


def exported(model: nn.Module, path: Path, format: str, around: Around) -> int:
    """How many system calls an export makes."""
    watched = Watched(around)
    actckpt.export(model, path, format=format, files=Files(watched))
    return watched.total


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("format", FORMATS)
def test_killed_anywhere(format: str, tmp_path: Path) -> None:
    name, apart = FORMATS[format]
    model = TRAVELLERS[name]()
    count = exported(model, tmp_path / "whole", format, quickly)
    assert count > 20
    there = []
    for number in (*range(0, count - 6, apart), *range(count - 6, count)):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(Killed):
            exported(model, place / "out", format, killed_at(number))
        left = os.listdir(place)
        assert all(name == "out" or name.startswith(EXPORTING) for name in left)
        if "out" in left:
            verify_folder(Files(), str(place / "out"))
            there.append(number)
    # only once it is whole and under its name
    assert there == list(range(count - 4, count))


def test_what_a_kill_left_goes_with_the_next_export_to_the_same_place(tmp_path: Path) -> None:
    model = TRAVELLERS["own"]()
    for name in ("out", "out-2"):
        with pytest.raises(Killed):
            exported(model, tmp_path / name, "pt", killed_at(15))
    dead, others = sorted(os.listdir(tmp_path), key=len)
    assert dead.startswith(f"{EXPORTING}out-")
    running = f"{EXPORTING}out-1-00112233"
    (tmp_path / running).mkdir()
    lock = Files().lock_directory(str(tmp_path / running))
    actckpt.export(model, tmp_path / "out", format="pt")
    assert set(os.listdir(tmp_path)) == {"out", others, running}
    Files().close(lock)
    # one whose name only begins so
    (tmp_path / f"{EXPORTING}out-mine").mkdir()
    os.rename(tmp_path / "out", tmp_path / "moved")
    actckpt.export(model, tmp_path / "out", format="pt")
    assert set(os.listdir(tmp_path)) == {"out", "moved", others, f"{EXPORTING}out-mine"}


@pytest.mark.parametrize("format", ["safetensors", "huggingface"])
def test_all_is_durable_before_it_has_its_name(format: str, tmp_path: Path) -> None:
    """What a library has written, too."""
    opened: dict[int, str] = {}
    durable: set[str] = set()
    named: list[set[str]] = []

    def around(call: Call, make: Make) -> Any:
        made = make(call)
        if call.name == "open":
            opened[made] = os.path.basename(call.args[0])
        if call.name == "fsync":
            durable.add(opened[call.args[0]])
        if call.name == "rename":
            named.append(set(durable))
        return made

    exported(TRAVELLERS["gpt2"](), tmp_path / "out", format, around)
    (before,) = named
    files = set(os.listdir(tmp_path / "out"))
    assert files < before
    assert [name for name in before - files if name.startswith(EXPORTING)]
    assert tmp_path.name in durable


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("format", [*FORMATS, "onnx"])
def test_a_device_that_takes_no_more(format: str, tmp_path: Path) -> None:
    """Whoever writes: the libraries meet the limit in their own code."""
    model = TRAVELLERS["gpt2" if format in ("huggingface", "onnx") else FORMATS[format][0]]()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        with pytest.raises(WeightsExportError, match="could not be written"):
            actckpt.export(model, tmp_path / "out", format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_errors_anywhere(code: int, tmp_path: Path) -> None:
    model = TRAVELLERS["own"]()
    count = exported(model, tmp_path / "whole", "huggingface", quickly)
    errors = 0
    for number in range(count):
        place = tmp_path / str(number)
        place.mkdir()
        said = ""
        try:
            exported(model, place / "out", "huggingface", failing_at(number, code))
        except WeightsExportError as error:
            said = str(error)
        errors += bool(said)
        there = not said or "is there and whole" in said
        assert os.listdir(place) == ["out"] * there
        if there:
            verify_folder(Files(), str(place / "out"))
    assert errors > count // 2
