"""Tensors that no step changes, stored once for all checkpoints of a directory.

Each of these files has the name of its own checksum and holds tensors by their content, so nothing
in it is ever another. Which tensors are frozen is decided by content at every save: what somebody
has changed by hand is another tensor, and goes with the checkpoint until it is seen to stay.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from actckpt.checkpoint.at_once import at_once
from actckpt.checkpoint.files import READERS, Files
from actckpt.checkpoint.frozen_files import held_in
from actckpt.checkpoint.manifest import FileEntry
from actckpt.checkpoint.names import FROZEN, SAVING, base_file, is_base_file, unique
from actckpt.checkpoint.snapshot import Snapshot, Where
from actckpt.checkpoint.tensor_file import write_tensors
from actckpt.checkpoint.tensor_key import key_of
from actckpt.checkpoint.verification import check_present, checked
from actckpt.errors import CheckpointFormatError

logger = logging.getLogger("actckpt")

# of a tensor; smaller ones go with every checkpoint
LEAST_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Placed:
    """Which tensors of a snapshot lie beside the checkpoint.

    Args:
        at: their file, and what they are called in it.
        files: all of these.
    """

    at: Mapping[Where, tuple[str, str]]
    files: dict[str, FileEntry]


class FrozenBase:
    """The frozen tensors of one directory; whoever writes there has its lock."""

    def __init__(self, files: Files, directory: str) -> None:
        self._files = files
        self._directory = directory
        self._folder = f"{directory}/{FROZEN}"
        # by key, the file that has it; of files that were read here to the last byte
        self._at: dict[str, str] = {}
        self._entries: dict[str, FileEntry] = {}
        self._looked = False
        # at the last save
        self._before: dict[Where, str] = {}

    def frozen(self, snapshot: Snapshot) -> dict[Where, str]:
        """Keys of the tensors that are.

        A parameter that is said to be, unless it was another at the last save; anything else that
        may be, once it was the same then.

        Raises:
            OSError: it cannot be told what is here already.
        """
        said = {
            (item, name): flag
            for item, encoded in snapshot.items.items()
            for name, flag in encoded.frozen.items()
            if encoded.tensors[name].numel() * encoded.tensors[name].itemsize >= LEAST_BYTES
        }
        if not said:
            return {}
        keys = _keys({at: snapshot.items[at[0]].tensors[at[1]] for at in said})
        self._look()
        before, self._before = self._before, keys
        return {
            at: key
            for at, key in keys.items()
            if key in self._at or before.get(at, key if said[at] else "") == key
        }

    def stored_bytes(self, snapshot: Snapshot, frozen: Mapping[Where, str]) -> int:
        """Size of those that are here already."""
        here = (at for at, key in frozen.items() if key in self._at)
        tensors = (snapshot.items[item].tensors[name] for item, name in here)
        return sum(t.numel() * t.itemsize for t in tensors)

    def hold(self, snapshot: Snapshot, frozen: Mapping[Where, str], verify: str) -> Placed:
        """These tensors, durable; what is not here yet is written and read back.

        Args:
            verify: what is read back, as for `verify_files`.

        Raises:
            OSError, CheckpointFormatError: they are not; nothing that was here is another.
        """
        new = {
            key: snapshot.items[item].tensors[name]
            for (item, name), key in frozen.items()
            if key not in self._at
        }
        if new:
            self._write(new, verify)
        at = {where: (self._at[key], key) for where, key in frozen.items()}
        named = sorted({file for file, _ in at.values()})
        return Placed(at, {file: self._entries[file] for file in named})

    def _write(self, tensors: Mapping[str, torch.Tensor], verify: str) -> None:
        files = self._files
        files.make_directories(self._folder)
        temporary = f"{self._folder}/{unique(SAVING, 'base')}"
        try:
            with files.writing(temporary) as sink:
                write_tensors(sink, tensors)
            entry = FileEntry(sink.written_bytes, sink.checksum)
            if verify == "full":
                with checked(files, temporary, entry):
                    pass
            name = base_file(entry.checksum)
            # one of that name has the same content, or is damaged
            files.rename(temporary, f"{self._directory}/{name}")
        except BaseException:
            _abandon(files, temporary)
            raise
        files.sync_directory(self._folder)
        self._entries[name] = entry
        self._at |= dict.fromkeys(tensors, name)

    def _look(self) -> None:
        """Finds what is here; what was seen to be sound before has to be there still."""
        if self._looked:
            for file, entry in [*self._entries.items()]:
                try:
                    check_present(self._files, f"{self._directory}/{file}", entry)
                except CheckpointFormatError:
                    self._forget(file)
            return
        if self._files.is_directory(self._folder):
            # who wrote there last may have been killed before it was known that its names last
            self._files.sync_directory(self._folder)
            for name in self._files.names(self._folder):
                if is_base_file(f"{FROZEN}/{name}"):
                    self._read(f"{FROZEN}/{name}")
        self._looked = True

    def _read(self, file: str) -> None:
        where = f"{self._directory}/{file}"
        status = self._files.status(where)
        if status is None:
            return
        try:
            found = held_in(self._files, where, file, status.st_size)
        except CheckpointFormatError as error:
            # what is in it is written anew, under the same name
            logger.warning("actckpt: %s", error)
            return
        self._entries[file], keys = found
        self._at |= dict.fromkeys(keys, file)

    def _forget(self, file: str) -> None:
        del self._entries[file]
        self._at = {key: at for key, at in self._at.items() if at != file}


def _abandon(files: Files, temporary: str) -> None:
    try:
        files.remove_tree(temporary)
    except OSError as error:
        logger.warning("actckpt: %s could not be removed, the next save will: %s", temporary, error)


def _keys(tensors: Mapping[Where, torch.Tensor]) -> dict[Where, str]:
    """Of many tensors, several at once."""
    wheres = sorted(tensors, key=lambda at: tensors[at].numel() * tensors[at].itemsize)
    shares = [wheres[k::READERS] for k in range(READERS)]
    found = at_once(lambda share: {at: key_of(tensors[at]) for at in share}, shares)
    return {at: key for part in found for at, key in part.items()}
