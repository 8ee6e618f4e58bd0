"""Saving in the background broken on purpose."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager

import pytest

from actckpt.checkpoint import commit
from actckpt.checkpoint.files import Files, Source
from actckpt.checkpoint.manifest import FileEntry
from actckpt.checkpoint.names import SAVING
from actckpt.checkpoint.verification import checked
from actckpt.resuming.checkpointer import Checkpointer
from actckpt.resuming.directory import RunDirectory
from actckpt.resuming.saves import Saves
from actckpt.resuming.saving import Saver
from actckpt.resuming.staging import Staging
from tests.faults.held import WRITER

Patch = pytest.MonkeyPatch


def error_kept_in_the_thread(mp: Patch) -> None:
    """A thread that fails is taken for one that has ended well."""
    end = Saver._end_oldest

    def deaf(self: Saver) -> None:
        saving, _ = self._under_way[0]
        saving.wait()
        saving.error = None
        end(self)

    mp.setattr(Saver, "_end_oldest", deaf)


def error_told_again(mp: Patch) -> None:
    """Who was told of an error is told of it once more."""
    failures = Saver.failures

    def again(self: Saver) -> list[BaseException]:
        self._failures = failures(self)
        return [*self._failures]

    mp.setattr(Saver, "failures", again)


def error_told_late(mp: Patch) -> None:
    """Nothing is said before the run is closed."""
    step = Checkpointer.step

    def silent(self: Checkpointer, metrics: dict[str, float]) -> bool:
        with pytest.MonkeyPatch.context() as meanwhile:
            meanwhile.setattr(Saves, "raise_failures", lambda self: None)
            return step(self, metrics)

    mp.setattr(Checkpointer, "step", silent)


def second_error_dropped(mp: Patch) -> None:
    """Of several errors one is told."""
    failures = Saver.failures
    mp.setattr(Saver, "failures", lambda self: failures(self)[:1])


def success_before_the_rename(mp: Patch) -> None:
    """The new directory gets its name once nobody waits for the thread any more."""
    owed: dict[str, str] = {}
    rename, release = Files.rename, RunDirectory.release

    def later(self: Files, source: str, target: str) -> None:
        if SAVING in source and threading.current_thread().name == WRITER:
            owed[target] = source
        else:
            rename(self, source, target)

    def check_there(fs: Files, where: str, entry: FileEntry) -> AbstractContextManager[Source]:
        directory, name = os.path.split(where)
        return checked(fs, f"{owed.get(directory, directory)}/{name}", entry)

    def release_last(self: RunDirectory) -> None:
        for target, source in owed.items():
            rename(self.files, source, target)
        owed.clear()
        release(self)

    mp.setattr(Files, "rename", later)
    mp.setattr(commit, "checked", check_there)
    mp.setattr(RunDirectory, "release", release_last)


def staging_without_a_copy(mp: Patch) -> None:
    """What is written is what training changes meanwhile."""
    mp.setattr(Staging, "copy", lambda self, items, into, steady: dict(items))


def one_staging_set_for_two(mp: Patch) -> None:
    """A state is copied over another that was not written yet."""
    mp.setattr(Saver, "_free_set", lambda self: self._staging.sets[0])
