"""The same start again and again: a sound run, or nothing at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actckpt.checkpoint.files import Files
from tests.faults.scenario import LAST, Acted, act, prepare
from tests.system_calls import Call, Make, Watched

RUN = "run"


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a process begins.

    Args:
        sound: the directory that it finds, None for none.
        in_thread: it saves in another thread.
    """

    name: str
    sound: Path | None
    in_thread: bool = False

    @property
    def allowed(self) -> tuple[int, int]:
        """Steps of the previous and the new checkpoint, 0 for none."""
        before = 0 if self.sound is None else LAST
        return before, before + 1

    @contextmanager
    def place(self) -> Iterator[Path]:
        """An empty directory with the run in it, as ``RUN``; deleted afterwards."""
        with tempfile.TemporaryDirectory(prefix="actckpt-faults-") as made:
            if self.sound is not None:
                shutil.copytree(self.sound, Path(made) / RUN)
            yield Path(made)

    def calls(self) -> list[str]:
        """The names of the calls of an undisturbed process, in order."""
        names: list[str] = []

        def note(call: Call, make: Make) -> object:
            names.append(call.name)
            return make(call)

        acted = Acted()
        with self.place() as place:
            act(place / RUN, Files(Watched(note)), acted.say, in_thread=self.in_thread)
        assert acted.claimed == self.allowed[1], acted
        return names


@contextmanager
def scenes() -> Iterator[tuple[Scene, ...]]:
    """Every start there is."""
    with tempfile.TemporaryDirectory(prefix="actckpt-faults-") as made:
        sound = Path(made) / RUN
        prepare(sound)
        yield (
            Scene("next", sound),
            Scene("first", None),
            Scene("thread", sound, in_thread=True),
        )
