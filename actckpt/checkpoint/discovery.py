"""Which checkpoints a directory holds, newest first, and why others do not count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from actckpt.checkpoint.files import Files
from actckpt.checkpoint.local_path import local_path
from actckpt.checkpoint.manifest import Manifest
from actckpt.checkpoint.names import MANIFEST, PINNED, parse_step_name
from actckpt.checkpoint.verification import read_manifest, verify_files
from actckpt.errors import CheckpointError, CheckpointFormatError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint whose manifest is sound; its other files only `verify` looks at."""

    path: Path
    manifest: Manifest
    pinned: bool = False

    @property
    def step(self) -> int:
        """Optimizer steps that had been made."""
        return self.manifest.step

    @property
    def metrics(self) -> dict[str, float]:
        """What was reported with the step."""
        return self.manifest.metrics

    @property
    def tag(self) -> str:
        """The user's own word for it, "" for none."""
        return self.manifest.tag

    @property
    def size_bytes(self) -> int:
        """Size on disk, without the manifest, and without frozen weights that others share."""
        return self.manifest.size_bytes

    def verify(self) -> None:
        """Reads every byte.

        Raises:
            CheckpointFormatError: a file is missing, damaged, or no regular file; it is named.
            CheckpointError: it cannot be read for a reason that is not its own.
        """
        verify_files(Files(), str(self.path))


@dataclass(frozen=True, slots=True)
class Skipped:
    """One entry that is named as a checkpoint and is none that can be used, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a directory holds: ``checkpoints`` newest first."""

    checkpoints: tuple[Checkpoint, ...]
    skipped: tuple[Skipped, ...]


def discover(files: Files, directory: str) -> Found:
    """The checkpoints in a directory by what their manifests say; empty where nothing is.

    Newest is what was saved last, which need not be of the largest step: a run may have been taken
    back to an earlier one.

    Raises:
        CheckpointError: the directory cannot be listed, or is no directory.
    """
    try:
        while True:
            found, vanished = _discover(files, directory, files.names(directory))
            # a writer retires old ones only once there is a newer one, which was not listed yet
            if found.checkpoints or not vanished:
                return found
    except FileNotFoundError:
        return Found((), ())
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be listed: {error}") from error


class _OfStep(Protocol):
    @property
    def step(self) -> int: ...


S = TypeVar("S", bound=_OfStep)


def newest_of(found: Sequence[S], step: int | None, directory: str) -> S:
    """The newest of a step, of what is newest first; None is the newest of all.

    Raises:
        CheckpointError: there is none.
    """
    for each in found:
        if step is None or each.step == step:
            return each
    if step is None:
        raise CheckpointError(f"{directory} has no usable checkpoint")
    steps = ", ".join(dict.fromkeys(str(each.step) for each in found)) or "none"
    raise CheckpointError(
        f"{directory} has no usable checkpoint of step {step}; there are: {steps}"
    )


def existing(files: Files, directory: str) -> Found:
    """As `discover`, where there must be something.

    Raises:
        ArgumentError: the directory is a URL.
        CheckpointError: there is not.
    """
    local_path(directory)
    found = discover(files, directory)
    if not found.checkpoints and not found.skipped:
        raise CheckpointError(
            f"{directory} holds no checkpoints: give the directory that a Checkpointer was made "
            "with, or one of its step-… directories"
        )
    return found


def checkpoint_at(files: Files, path: str) -> Checkpoint:
    """The checkpoint in a directory, or the newest of a run in it.

    Raises:
        ArgumentError: the path is a URL.
        CheckpointError: there is none whose manifest is sound.
    """
    local_path(path)
    try:
        alone = files.status(f"{path}/{MANIFEST}") is not None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Give the directory of a run, or of a checkpoint"
        ) from error
    if alone:
        return Checkpoint(Path(path), read_manifest(files, path))
    found = existing(files, path)
    if not found.checkpoints:
        first = found.skipped[0]
        raise CheckpointError(f"{path} has no usable checkpoint; {first.name}: {first.reason}")
    return found.checkpoints[0]


def _discover(files: Files, directory: str, names: list[str]) -> tuple[Found, bool]:
    """What there is of these names, and whether some have gone since they were listed."""
    vanished = False
    found: list[Checkpoint] = []
    skipped: list[Skipped] = []
    for name in names:
        if parse_step_name(name) is None:
            continue
        path = f"{directory}/{name}"
        try:
            if not files.is_directory(path):
                raise CheckpointFormatError(
                    f"{path} is no directory, or a link to one; give the real one its name"
                )
            manifest = read_manifest(files, path)
        except CheckpointFormatError as error:
            # another process may have retired it in the meantime
            if files.status(path) is not None:
                skipped.append(Skipped(name, str(error)))
            else:
                vanished = True
            continue
        found.append(Checkpoint(Path(path), manifest, PINNED + name in names))
    found.sort(key=lambda c: (c.manifest.serial, c.step, c.path.name), reverse=True)
    return Found(tuple(found), tuple(skipped)), vanished
