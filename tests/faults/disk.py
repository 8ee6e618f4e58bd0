"""A disk with a volatile cache: what it was told, and what of that outlives a loss of power.

Only fsync promises: of a file its content, of a directory its names. Everything else may be on the
device or not, each part independently of the others, a file's new content even in part.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from tests.system_calls import Call


@dataclass(slots=True)
class File:
    """Content as programs see it, and as it is on the device."""

    now: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


@dataclass(slots=True)
class Folder:
    """Names as programs see them, as they are on the device, and the changes between."""

    now: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[dict[str, File | Folder | None]] = field(default_factory=list)

    def change(self, names: dict[str, File | Folder | None]) -> None:
        """Some names at once, None for one that goes."""
        self.pending.append(names)
        apply_names(self.now, names)


def apply_names(entries: dict[str, File | Folder], names: dict[str, File | Folder | None]) -> None:
    """A change of names."""
    for name, node in names.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class Disk:
    """What is below a directory, beginning with all of it durable."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[int, tuple[File | Folder, int]] = {}
        self.root = _load(root)

    def apply(self, call: Call, result: object) -> None:
        """One call that was made."""
        getattr(self, f"_on_{call.name}", lambda *_: None)(result, *call.args)

    def folder(self, path: Path) -> Folder:
        """What programs see in a directory."""
        found = self._node(str(path))
        assert isinstance(found, Folder)
        return found

    def _at(self, path: str) -> tuple[Folder, str]:
        *parents, name = Path(path).relative_to(self._root).parts
        folder = self.root
        for parent in parents:
            found = folder.now[parent]
            assert isinstance(found, Folder)
            folder = found
        return folder, name

    def _node(self, path: str) -> File | Folder:
        if Path(path) == self._root:
            return self.root
        folder, name = self._at(path)
        return folder.now[name]

    def _on_open(self, fd: int, path: str, flags: int, mode: int) -> None:
        if flags & os.O_CREAT:
            folder, name = self._at(path)
            if name not in folder.now:
                folder.change({name: File()})
        # the directories above are not at stake
        node = self._node(path) if Path(path).is_relative_to(self._root) else Folder()
        if flags & os.O_TRUNC and isinstance(node, File):
            node.now.clear()
        appends = flags & os.O_APPEND and isinstance(node, File)
        self._open[fd] = node, len(node.now) if appends else 0

    def _on_close(self, _: None, fd: int) -> None:
        self._open.pop(fd, None)

    def _on_write(self, count: int, fd: int, data: bytes) -> None:
        node, at = self._open[fd]
        assert isinstance(node, File)
        node.now[at : at + count] = data[:count]
        self._open[fd] = node, at + count

    def _on_fsync(self, _: None, fd: int) -> None:
        node = self._open[fd][0]
        if isinstance(node, File):
            node.durable = bytes(node.now)
        else:
            node.durable = dict(node.now)
            node.pending.clear()

    def _on_mkdir(self, _: None, path: str, mode: int) -> None:
        folder, name = self._at(path)
        folder.change({name: Folder()})

    def _on_rename(self, _: None, source: str, target: str) -> None:
        (old, was), (new, name) = self._at(source), self._at(target)
        assert old is new, "not a rename within one directory"
        if was != name:
            old.change({was: None, name: old.now[was]})

    def _on_unlink(self, _: None, path: str) -> None:
        folder, name = self._at(path)
        folder.change({name: None})

    _on_rmdir = _on_unlink


def _load(path: Path) -> Folder:
    folder = Folder()
    for entry in path.iterdir():
        if entry.is_dir():
            folder.now[entry.name] = _load(entry)
        else:
            data = entry.read_bytes()
            folder.now[entry.name] = File(bytearray(data), data)
    folder.durable = dict(folder.now)
    return folder
