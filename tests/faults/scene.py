"""The same start again and again: a sound run, or nothing at all; and what a process does there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from actckpt.checkpoint import files
from actckpt.checkpoint.files import Files
from tests.faults import acts
from tests.faults.acts import Act
from tests.faults.place import empty_place
from tests.faults.saying import Acted
from tests.faults.scenario import LAST, Before, prepare
from tests.system_calls import Call, Make, Watched

RUN = "run"


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a process begins, and what it does.

    Args:
        sound: the directory that it finds, None for none.
        resumes_as_others: what it does before it has resumed, another scene's process does too.
        frozen: whether most of the model is.
    """

    name: str
    sound: Path | None
    act: Act = acts.AT_ONCE
    resumes_as_others: bool = False
    frozen: bool = False

    @property
    def known(self) -> Before:
        """What is there before."""
        return Before(() if self.sound is None else tuple(range(1, LAST + 1)), self.frozen)

    @contextmanager
    def place(self) -> Iterator[Path]:
        """An empty directory with the run in it, as ``RUN``; deleted afterwards."""
        with empty_place() as place:
            if self.sound is not None:
                shutil.copytree(self.sound, place / RUN)
            yield place

    def calls(self) -> tuple[list[str], int]:
        """The names of the calls of an undisturbed process, in order; how many it resumes with."""
        names: list[str] = []
        resumed: list[int] = []
        acted = Acted()

        def note(call: Call, make: Make) -> object:
            names.append(call.name)
            return make(call)

        def say(word: str, what: object) -> None:
            acted.say(word, what)
            if word == "resumed":
                resumed.append(len(names))

        with self.place() as place:
            self.act(place / RUN, Files(Watched(note)), say)
        assert acted.claimed, acted
        return names, resumed[0]


@contextmanager
def scenes() -> Iterator[tuple[Scene, ...]]:
    """Every start there is, and everything that is done from the first."""
    with (
        empty_place() as place,
        pytest.MonkeyPatch.context() as patch,
    ):
        # the states are small, and every kind of call is to fail
        patch.setattr(files, "WRITE_BACK_BYTES", 512)
        sound = place / RUN
        prepare(sound)
        frozen = place / "frozen"
        prepare(frozen, frozen=True)
        others = {
            "thread": acts.IN_A_THREAD,
            "due": acts.DUE,
            "two at a time": acts.TWO_AT_A_TIME,
            "asked for": acts.ASKED_FOR,
            "pins": acts.PINS,
        }
        yield (
            Scene("next", sound),
            Scene("first", None),
            *(Scene(name, sound, act, resumes_as_others=True) for name, act in others.items()),
            Scene("frozen", frozen, acts.FROZEN_AT_ONCE, resumes_as_others=True, frozen=True),
        )
