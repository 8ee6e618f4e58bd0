"""What a process did to the disk and what it said, in order."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actckpt.checkpoint.names import MANIFEST
from tests.faults.disk import Disk, File, Folder
from tests.faults.kinds import CHANGING
from tests.faults.saying import PROMISES, Acted
from tests.system_calls import Call, Make


@dataclass(frozen=True, slots=True)
class Done:
    """A call that was really made, with its result."""

    call: Call
    result: Any


@dataclass(frozen=True, slots=True)
class Said:
    """A word of the process."""

    word: str
    what: Any


@dataclass(slots=True)
class Recording:
    """Around system calls, for `Watched`; also listens, as an `Act` wants it."""

    events: list[Done | Said] = field(default_factory=list)

    def __call__(self, call: Call, make: Make) -> Any:
        result = make(call)
        args = call.args
        if call.name == "write":
            args = (args[0], bytes(args[1]))  # the buffer is the process's own
        self.events.append(Done(Call(call.number, call.name, args), result))
        return result

    def say(self, word: str, what: Any) -> None:
        """As `Acted.say`."""
        self.events.append(Said(word, what))

    def acted(self, until: int | None = None) -> Acted:
        """What was said, in the first so many events."""
        acted = Acted()
        for event in self.events[:until]:
            if isinstance(event, Said):
                acted.say(event.word, event.what)
        return acted

    def instants(self) -> list[int]:
        """Numbers of events after which the disk is another, or more was promised."""
        found = [0]
        for count, event in enumerate(self.events, 1):
            if isinstance(event, Said):
                changes = event.word in PROMISES
            else:
                name, args = event.call.name, event.call.args
                changes = name in CHANGING or (name == "open" and bool(args[1] & os.O_CREAT))
            if changes:
                found.append(count)
        return found


def apply(disk: Disk, events: list[Done | Said]) -> None:
    """Does to a simulated disk what was done to the real one."""
    for event in events:
        if isinstance(event, Done):
            disk.apply(event.call, event.result)


def out_of_order(disk: Disk, events: list[Done | Said]) -> list[str]:
    """Manifests that were begun before everything they vouch for was durable.

    As long as a checkpoint gets its name last, no crash can show this; the rule is one more guard.
    """
    wrong = []
    for event in events:
        if isinstance(event, Done):
            disk.apply(event.call, event.result)
            name, args = event.call.name, event.call.args
            if name == "open" and args[1] & os.O_CREAT:
                path = Path(args[0])
                folder = disk.folder(path.parent)
                if path.name == MANIFEST and (bad := _not_durable(folder)):
                    wrong.append(f"{path.name} is begun before {bad} is durable")
                if path.name != MANIFEST and MANIFEST in folder.now:
                    wrong.append(f"{path.name} is begun after {MANIFEST}")
    return wrong


def _not_durable(folder: Folder) -> list[str]:
    return [
        name
        for name, node in folder.now.items()
        if name != MANIFEST and isinstance(node, File) and node.durable != node.now
    ]
