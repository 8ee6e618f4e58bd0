"""All faults in all scenes, or a part of them in a bounded time."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.faults.erring import inject
from tests.faults.killing import kill_at
from tests.faults.kinds import CHANGING, Fails, Fault, errors
from tests.faults.mutants import Mutant
from tests.faults.power_loss import lose_power, lose_power_later
from tests.faults.scene import Scene
from tests.faults.tally import Caught, Tally


@dataclass(frozen=True, slots=True)
class Extent:
    """Of which faults one in how many is injected.

    Args:
        close: besides, of kills in the first scenes, which are gone through most closely.
        more: besides, of everything beyond the first scenes.
        parts: random survivals of each loss of power.
    """

    kills: int
    errors: int
    later: int
    close: int
    more: int
    parts: int


WHOLE = Extent(kills=1, errors=1, later=1, close=1, more=1, parts=8)
# no number of calls is a multiple of these: every kind of error meets other calls
BOUNDED = Extent(kills=5, errors=37, later=83, close=2, more=13, parts=1)

Scan = Callable[[Tally], None]


def scans(scene: Scene, extent: Extent) -> Iterator[tuple[str, Scan]]:
    """The names of the faults of a scene, and what injects them."""
    names, resumed = scene.calls()
    more = extent.more if scene.resumes_as_others else 1
    first = resumed if scene.resumes_as_others else 0
    # between two changes of the disk, every kill leaves the same
    after = {at + 1 for at, name in enumerate(names[:-1]) if name in (*CHANGING, "open")}
    kills = extent.more if scene.resumes_as_others else extent.close
    calls = _from(first, {*range(0, len(names), extent.kills), *after})[::kills]
    faults = _part([f for f in errors(names) if f.at >= first], extent.errors, more)
    sampled = range(extent.later // 2, len(names), extent.later)
    later = _from(first, {*sampled, *_after_new(names)})[::more]
    rest = min(extent.parts, 2)
    yield "killed", lambda tally: kill_at(scene, calls, tally)
    yield "errors", lambda tally: inject(scene, faults, tally)
    yield "power lost", lambda tally: lose_power(scene, extent.parts, tally)
    yield "killed, then power lost", lambda tally: lose_power_later(scene, later, rest, tally)


def run(scene: Scene, extent: Extent) -> Iterator[Tally]:
    """The books of every scan of a scene."""
    for name, scan in scans(scene, extent):
        tally = Tally(f"{scene.name}: {name}")
        scan(tally)
        yield tally


def caught(scene: Scene, mutant: Mutant) -> str:
    """The first violation that a mutant is caught with, "" if it gets away."""
    with pytest.MonkeyPatch.context() as patch:
        mutant.breaks(patch)
        names, resumed = scene.calls()
        # few, where they do most harm; and those last that go on, for they may begin with a call
        # of the journal's, of which nobody is told
        faults = [f for f in errors(names) if f.at >= resumed and _harms(f, names)]
        faults.sort(key=lambda f: (isinstance(f, Fails) and f.on, f.at))
        try:
            lose_power(scene, 0, Tally("power lost", one_is_enough=True))
            kill_at(scene, range(resumed, len(names), 15), Tally("killed", one_is_enough=True))
            inject(scene, faults, Tally("errors", one_is_enough=True))
            later = _from(resumed, _after_new(names))
            lose_power_later(scene, later, 0, Tally("later", one_is_enough=True))
        except Caught as found:
            return str(found)
    return ""


def _after_new(names: list[str]) -> set[int]:
    """Calls at which a directory or a name is new, and its parent does not yet know for good."""
    return {at + 1 for at, name in enumerate(names) if name in ("mkdir", "rename")}


def _from(first: int, calls: set[int]) -> list[int]:
    return sorted(at for at in calls if at >= first)


def _part(faults: list[Fault], one_in: int, more: int) -> list[Fault]:
    """The plain error of every call, and a part of the others."""
    return [f for f in faults if not _other(f)][::more] + [f for f in faults if _other(f)][
        :: one_in * more
    ]


def _harms(fault: Fault, names: list[str]) -> bool:
    plain = not isinstance(fault, Fails) or (fault.code == errno.EIO and not fault.late)
    return plain and names[fault.at] in CHANGING


def _other(fault: Fault) -> bool:
    return not isinstance(fault, Fails) or fault.code != errno.EIO or fault.late or fault.on
