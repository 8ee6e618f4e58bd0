"""A process that trains, saves, and says what it may rely on as soon as it may."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import actckpt
from actckpt.checkpoint.files import Files
from tests.faults.held import WRITER, Held
from tests.faults.saying import Say
from tests.faults.scenario import KEPT, objects, update

# how an error names the save that failed
_NAMED = re.compile(r"step (\d+) (?:could not be saved|was written|needs)")


class Trainer:
    """A run, and what its user knows of its saves.

    Args:
        frozen: as for `objects`.
        how: further arguments of the Checkpointer.
    """

    def __init__(
        self, directory: Path, files: Files, say: Say, *, frozen: bool = False, **how: Any
    ) -> None:
        self._held = Held(files.calls)
        self._made = objects(frozen=frozen)
        self._say = say
        # begun, and neither known to be made nor to have failed
        self._open: list[int] = []
        watched = Files(self._held)
        self.run = actckpt.Checkpointer(
            directory, **self._made, keep_last=KEPT, files=watched, **{"every": None, **how}
        )
        # in this thread, and while no other makes calls: their order is the same every time
        journal = self.run._places.journal
        journal.behind = False
        self._journal_work: dict[bool, list[Any]] = {False: [], True: []}
        self._perform = journal._perform
        journal._perform = self._note_journal  # type: ignore[method-assign]

    def resume(self) -> bool:
        """Whether the run was taken up, or is new."""
        if not self._told(self.run.resume, "refused"):
            return False
        self._say("resumed", self.run.step_count)
        return True

    def update(self) -> None:
        """The optimizer's part of the next step."""
        update(self._made)

    def update_meanwhile(self, saves: int = 1) -> None:
        """The same, before so many of the saves that were begun write anything."""
        self.update()
        self._held.go_on(saves)

    def step(self, *, due: bool = False) -> None:
        """Counts it; where a save is ``due``, that begins."""
        step = self.run.step_count + 1
        if due:
            self._begin(step)
        self._told(lambda: self.run.step({"loss": 1.0 / step}))
        self._write_journal()

    def save(self, through: Callable[[Callable[[], Any]], Any] | None = None) -> bool:
        """Whether a save that is waited for made one; ``through`` calls it."""
        self._begin(self.run.step_count)
        made = self._told(self.run.save if through is None else lambda: through(self.run.save))
        if made:
            self.claim()
        self._write_journal()
        return made

    def save_behind(self) -> None:
        """A save that is not."""
        self._begin(self.run.step_count)
        self._told(lambda: self.run.save(wait=False))

    def list(self) -> None:
        """Waits for the saves so far, but is not told of their errors."""
        self._told(self.run.list, "refused")

    def claim(self, *steps: int) -> None:
        """Says that these are saved, or all, as far as nothing was said to the contrary."""
        for step in [s for s in self._open if s in steps or not steps]:
            self._open.remove(step)
            self._say("claimed", step)

    def pin(self, step: int, pinned: bool = True) -> bool:
        """Whether it was done; says so before and after."""
        word = "pin" if pinned else "unpin"
        self._say(f"{word}ning", step)
        done = self._told(lambda: self.run.pin(step, pinned), "refused")
        if done:
            self._say(f"{word}ned", step)
        return done

    def end(self) -> None:
        """Closes; what was begun is made then, or was said not to be."""
        self._held.go_on(10)
        self._told(self.run.close)
        self.claim()

    def leave(self) -> None:
        """Ends for good, however it came here; after `end` there is nothing left to be told."""
        self._held.go_on(10)
        self._told(self.run.close)
        # the next process is forked
        for thread in threading.enumerate():
            if thread.name == WRITER:
                thread.join()

    def _note_journal(self, work: Iterable[Any]) -> None:
        """Keeps apart what saves in the background ask for, before a step or after it by chance."""
        self._journal_work[threading.current_thread().name == WRITER] += work

    def _write_journal(self) -> None:
        """What its own thread would do; the steps first."""
        work, self._journal_work = self._journal_work, {False: [], True: []}
        self._perform(work[False] + work[True])

    def _begin(self, step: int) -> None:
        self._open.append(step)
        self._say("begun", step)

    def _told(self, work: Callable[[], Any], word: str = "errors") -> bool:
        """Whether this raised nothing; says what it raised, and which saves that was of."""
        try:
            work()
        except (actckpt.CheckpointError, OSError) as error:
            self._say(word, error)
            text = "\n".join([str(error), *getattr(error, "__notes__", [])])
            named = [int(found) for found in _NAMED.findall(text)]
            # what keeps a save from beginning need not name it
            for step in named or (self._open[-1:] if word == "errors" else []):
                self._say("failed", step)
                self._open = [s for s in self._open if s != step]
            return False
        return True
