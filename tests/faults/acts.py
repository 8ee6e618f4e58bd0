"""What a process does: it takes a run up, trains, saves in one way or another, and retires."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from actckpt.checkpoint.files import Files
from tests.faults.saying import Say
from tests.faults.trainer import Trainer


class Act(Protocol):
    """All that one process does in a directory."""

    def __call__(self, directory: Path, files: Files, say: Say) -> None: ...


def _acts(does: Callable[[Trainer], None], **how: Any) -> Act:
    def act(directory: Path, files: Files, say: Say) -> None:
        trainer = Trainer(directory, files, say, **how)
        try:
            if trainer.resume():
                does(trainer)
                trainer.end()
        finally:
            trainer.leave()

    return act


def _at_once(trainer: Trainer) -> None:
    """A save of what was taken up, which is there already, and one of the next step."""
    if trainer.run.step_count:
        trainer.save()
    trainer.update()
    trainer.step()
    trainer.save()


def _in_a_thread(trainer: Trainer) -> None:
    trainer.update()
    trainer.step()
    trainer.save(_elsewhere)


def _due(trainer: Trainer) -> None:
    """Two steps that save in the background, the second once the first has ended."""
    trainer.update()
    trainer.step(due=True)
    trainer.update_meanwhile()
    trainer.step(due=True)
    # it had to wait for the staging memory
    trainer.claim(trainer.run.step_count - 1)
    trainer.update_meanwhile()


def _two_at_a_time(trainer: Trainer) -> None:
    """Two steps that save in the background, both before anything is written."""
    trainer.update()
    trainer.step(due=True)
    trainer.update()
    trainer.step(due=True)
    trainer.update_meanwhile(2)


def _asked_for(trainer: Trainer) -> None:
    """A save in the background that `list` waits for, then one that is waited for itself."""
    trainer.update()
    trainer.step()
    trainer.save_behind()
    trainer.update_meanwhile()
    trainer.list()
    trainer.step()
    trainer.claim(trainer.run.step_count - 1)
    trainer.save()


def _pins(trainer: Trainer) -> None:
    """A checkpoint pinned that would be deleted, later no longer, and one as it is written."""
    newest = trainer.run.step_count
    pinned = trainer.pin(newest - 1)
    trainer.update()
    trainer.step()
    saved = trainer.save()
    # who knows better does not ask for the impossible
    if pinned:
        trainer.pin(newest - 1, False)
    trainer.update()
    trainer.step()
    trainer.save_behind()
    trainer.update_meanwhile()
    if saved:
        trainer.pin(newest + 1)


def _elsewhere(work: Callable[[], Any]) -> Any:
    """The result of ``work`` in another thread."""
    result: list[Any] = []
    failed: list[BaseException] = []

    def body() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return result[0]


AT_ONCE = _acts(_at_once)
IN_A_THREAD = _acts(_in_a_thread)
DUE = _acts(_due, every=1)
TWO_AT_A_TIME = _acts(_two_at_a_time, every=1, staging_sets=2)
ASKED_FOR = _acts(_asked_for)
PINS = _acts(_pins)
FROZEN_AT_ONCE = _acts(_at_once, frozen=True)
