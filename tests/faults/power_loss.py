"""Loss of power at every instant of a process, with everything gone that was not made durable."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from actckpt.checkpoint.files import Files
from tests.faults.disk import Disk
from tests.faults.judge import violations
from tests.faults.place import empty_place
from tests.faults.recording import Recording, apply, out_of_order
from tests.faults.saying import Acted
from tests.faults.scenario import Before
from tests.faults.scene import RUN, Scene
from tests.faults.survivors import FIXED, at_random, write_out
from tests.faults.tally import Tally
from tests.system_calls import Call, Make, Watched, nested


class Ended(BaseException):
    """The process is no more."""


@dataclass(slots=True)
class Ends:
    """From one call on nothing happens any more, as in a process that was killed."""

    at: int
    fired: int = 0

    def __call__(self, call: Call, make: Make) -> Any:
        if call.number < self.at:
            return make(call)
        self.fired = 1
        if call.name == "close":  # descriptors end with their process
            return make(call)
        raise Ended


def lose_power(scene: Scene, parts: int, tally: Tally) -> None:
    """Power lost after every call of an undisturbed process.

    Args:
        parts: how many random survivals beside the fixed ones.
    """
    with scene.place() as place:
        disk, again, recording = Disk(place), Disk(place), Recording()
        files = Files(Watched(recording))
        scene.act(place / RUN, files, recording.say)
    _crashes("undisturbed", disk, recording, 0, scene.known, parts, tally)
    tally.broken("undisturbed", out_of_order(again, recording.events))


def lose_power_later(scene: Scene, calls: Iterable[int], parts: int, tally: Tally) -> None:
    """A process is killed before each of these calls; power is lost in the one that follows."""
    for at in calls:
        with scene.place() as place:
            disk, recording, ends = Disk(place), Recording(), Ends(at)
            files = Files(Watched(nested(ends, recording)))
            with suppress(Ended):
                scene.act(place / RUN, files, recording.say)
            start = len(recording.events)
            scene.act(place / RUN, Files(Watched(recording)), recording.say)
        tally.broken(f"killed before call {at}", [] if ends.fired else ["was not"])
        _crashes(f"killed before call {at}", disk, recording, start, scene.known, parts, tally)


def survives(disk: Disk, recording: Recording, known: Before) -> list[str]:
    """What is wrong with what is left if power is lost once the process has ended."""
    apply(disk, recording.events)
    return _judged(FIXED[0].left(disk.root), recording.acted(), known)


def _crashes(
    name: str,
    disk: Disk,
    recording: Recording,
    start: int,
    known: Before,
    parts: int,
    tally: Tally,
) -> None:
    """Loses power at every instant after the first ``start`` events."""
    done = 0
    judged: dict[Any, list[str]] = {}
    for instant in [start, *(i for i in recording.instants() if i > start)]:
        apply(disk, recording.events[done:instant])
        done = instant
        acted = recording.acted(instant)
        for survivors in (*FIXED, *(at_random(1000 * instant + n) for n in range(parts))):
            left = survivors.left(disk.root)
            # much of what survives is the same from one instant to the next
            key = acted.expects, frozenset(left.items())
            if key not in judged:
                judged[key] = _judged(left, acted, known)
            lost = f"{name}, power lost after event {instant} ({survivors.name})"
            tally.add(lost, 1, judged[key])


def _judged(left: dict[str, bytes | None], acted: Acted, known: Before) -> list[str]:
    with empty_place() as place:
        write_out(left, place)
        return violations(place / RUN, acted, known)
