"""SIGKILL before every system call of resuming, saving and retiring."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from actckpt.checkpoint.files import Files
from tests.faults.judge import violations
from tests.faults.kinds import Kills
from tests.faults.saying import Acted
from tests.faults.scene import RUN, Scene
from tests.faults.tally import Tally
from tests.system_calls import Watched


def kill_at(scene: Scene, calls: Iterable[int], tally: Tally) -> None:
    """Kills a process of its own before each of these calls."""
    for at in calls:
        with scene.place() as place:
            fired, acted = _killed(scene, place / RUN, at)
            wrong = violations(place / RUN, acted, scene.known)
        tally.add(f"killed before call {at}", fired, wrong)


def _killed(scene: Scene, directory: Path, at: int) -> tuple[bool, Acted]:
    """Whether the kill ended the process, and what that had said by then."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            files = Files(Watched(Kills(at, writing)))

            def say(word: str, what: Any) -> None:
                os.write(writing, f"{word} {what!r}\n".encode())

            scene.act(directory, files, say)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(pid, 0)
    acted = Acted()
    for line in lines:
        word, _, what = line.partition(" ")
        if word in ("errors", "refused"):
            acted.say(word, RuntimeError(what))  # nothing may fail before it is killed
        elif word != "fired":
            acted.say(word, int(what))
    return "fired" in lines and os.waitstatus_to_exitcode(status) == -signal.SIGKILL, acted
