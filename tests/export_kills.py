"""Exports that libraries write, killed at file system calls: ``python -m tests.export_kills``.

A forked process is killed by SIGKILL before every call by which Python opens, makes, renames or
deletes something, whoever asks for it; and by SIGXFSZ, which the kernel sends, in a write beyond so
many bytes of a file, in whatever language.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from actckpt.checkpoint.files import Files
from actckpt.checkpoint.system_calls import OperatingSystem
from actckpt.errors import CheckpointFormatError
from actckpt.exporting import hugging_face, onnx_file
from actckpt.exporting.export import begin
from actckpt.exporting.folder import EXPORTING, verify_folder
from actckpt.exporting.prepared import Asked
from tests.travelling import TRAVELLERS

LIBRARIES = (
    "transformers",
    "huggingface_hub",
    "safetensors",
    "onnx",
    "onnx_ir",
    "torch",
    "actckpt",
)
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link")
# a model, and how large a file of its weights may be
FORMATS = {"huggingface": ("gpt2", 60_000), "onnx": ("own", None)}

Setup = Callable[[], None]


def main() -> None:
    warnings.simplefilter("ignore")
    # processes are forked: there must be no threads
    torch.set_num_threads(1)
    formats = sys.argv[1:] or FORMATS
    sys.stdout.write(json.dumps({format: _told(format) for format in formats}))


def _told(format: str) -> dict[str, Any]:
    name, shard_bytes = FORMATS[format]
    model = TRAVELLERS[name]()
    example = dict(TRAVELLERS[name].inputs[0]) if format == "onnx" else None
    asked = Asked(max_shard_bytes=shard_bytes, example=example)
    _only_writing(model, example)

    def export(place: Path) -> None:
        begin(
            model, place / "out", format=format, item="model", model=None, asked=asked, files=None
        ).write()

    kills, wrong, there = 0, [], 0
    with tempfile.TemporaryDirectory() as root:
        sizes = _sizes(export, Path(root))
        by = os.open(f"{root}/by", os.O_RDWR | os.O_CREAT)
        calls = _at_calls(Path(root), by)
        for number, setup in enumerate(chain(calls, map(_at_size, sizes))):
            place = Path(root) / str(number)
            place.mkdir()
            status = _forked(lambda place=place: export(place), setup)  # type: ignore[misc]
            if os.WIFEXITED(status):
                if os.WEXITSTATUS(status):
                    wrong.append(f"{number}: ended with {os.WEXITSTATUS(status)}")
                continue
            kills += 1
            found = [*_found(place)]
            wrong += [f"{number}: {said}" for said in found if said != "there"]
            there += "there" in found
        os.lseek(by, 0, os.SEEK_SET)
        callers = Counter(os.read(by, 1 << 20).decode().split())
        os.close(by)
    return {"kills": kills, "wrong": wrong, "there": there, "sizes": len(sizes), "by": callers}


def _only_writing(model: Any, example: Any) -> None:
    """Leaves out of every process what writes nothing and takes long."""
    setattr(OperatingSystem, "fsync", lambda *_: None)  # noqa: B010
    hugging_face._read_back = lambda *_: []
    onnx_file._check_outputs = lambda *_: None
    if example is not None:
        traced = onnx_file._traced(model.eval(), example)
        onnx_file._traced = lambda *_: traced


def _sizes(export: Callable[[Path], None], root: Path) -> list[int]:
    """Sizes that some file exceeds: those at which each is killed as it begins, and in the end."""
    (root / "whole").mkdir()
    if status := _forked(lambda: export(root / "whole"), lambda: None):
        raise AssertionError(f"undisturbed, it ended with {status}")
    found = {path.stat().st_size for path in (root / "whole" / "out").rglob("*") if path.is_file()}
    return sorted({0} | {size - 1 for size in found} | {size // 2 for size in found})


def _at_calls(root: Path, told: int) -> Iterator[Setup]:
    """One that kills at the first call, at the second, and so on until none is left.

    Args:
        told: a descriptor that is told whose call it was.
    """
    left = root / "left"
    at = 0
    while not left.exists():

        def setup(at: int = at) -> None:
            count = 0

            def hook(event: str, args: tuple[Any, ...]) -> None:
                nonlocal count
                if event in EVENTS and str(root) in str(args[0]):
                    if count == at:
                        os.write(told, f"{_caller()}\n".encode())
                        os.kill(os.getpid(), signal.SIGKILL)
                    count += 1

            sys.addaudithook(hook)
            _LAST.append(lambda: left.touch() if count <= at else None)

        yield setup
        at += 1


# what a forked process does that was not killed
_LAST: list[Callable[[], None]] = []


def _caller() -> str:
    """The library whose code runs."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if name in LIBRARIES:
            return name
        frame = frame.f_back
    return "?"


def _at_size(size_bytes: int) -> Setup:
    def setup() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))

    return setup


def _forked(work: Callable[[], None], setup: Setup) -> int:
    """How a process ended that did this."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            setup()
            work()
            for last in _LAST:
                last()
            status = 0
        except BaseException as error:
            sys.stderr.write(f"{error!r:.500}\n")
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def _found(place: Path) -> Iterator[str]:
    """What is wrong with a place, and "there" where the whole folder is."""
    for name in os.listdir(place):
        if name == "out":
            try:
                verify_folder(Files(), str(place / "out"))
                yield "there"
            except CheckpointFormatError as error:
                yield str(error)
        elif not name.startswith(EXPORTING):
            yield f"{name} is in sight"


if __name__ == "__main__":
    main()
