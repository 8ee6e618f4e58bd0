"""What is left on a device after a loss of power, from the least to any part of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.disk import File, Folder, apply_names

Names = dict[str, File | Folder]


@dataclass(frozen=True, slots=True)
class Survivors:
    """A choice of the names of a directory and the content of a file."""

    name: str
    names: Callable[[Folder], Names]
    data: Callable[[File], bytes]

    def left(self, folder: Folder, at: str = ".") -> dict[str, bytes | None]:
        """What survives below a directory: content by path, None for a directory."""
        found: dict[str, bytes | None] = {at: None}
        for name, node in self.names(folder).items():
            if isinstance(node, File):
                found[f"{at}/{name}"] = self.data(node)
            else:
                found |= self.left(node, f"{at}/{name}")
        return found


def write_out(left: dict[str, bytes | None], target: Path) -> None:
    """The real files of what `Survivors.left` found."""
    for path, data in left.items():
        if data is None:
            (target / path).mkdir(exist_ok=True)
        else:
            (target / path).write_bytes(data)


def _now(node: Folder) -> Names:
    return node.now


def _durable(node: Folder) -> Names:
    return node.durable


FIXED = (
    Survivors("only what was synced", _durable, lambda f: f.durable),
    # what file systems do that delay allocation
    Survivors("all names, synced content", _now, lambda f: f.durable),
    Survivors("synced names, all content", _durable, lambda f: bytes(f.now)),
)


def at_random(seed: int) -> Survivors:
    """Any of the changes since the last fsync, and any part of a file's content."""
    rng = random.Random(seed)

    def names(folder: Folder) -> Names:
        found = dict(folder.durable)
        for change in folder.pending:
            if rng.random() < 0.5:
                apply_names(found, change)
        return found

    def data(file: File) -> bytes:
        if file.durable == file.now:
            return file.durable
        now, cut = bytes(file.now), rng.randrange(len(file.now) + 1)
        return rng.choice([file.durable, now, now[:cut], now[:cut] + bytes(len(now) - cut)])

    return Survivors(f"part {seed}", names, data)
