"""Everything that a checkpoint will hold, and as which files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from actckpt.checkpoint.digest import Digest
from actckpt.checkpoint.encoding import Encoded
from actckpt.checkpoint.manifest import FileEntry, Manifest
from actckpt.checkpoint.names import STATE
from actckpt.checkpoint.tensor_file import Writable, write_tensors
from actckpt.checkpoint.tensor_key import key_of
from actckpt.checkpoint.verification import STATE_VERSION

# of a tensor, in all that describes it
_ENTRY_BYTES = 400
# of a file, its last block and what a file system keeps of it
_BLOCK_BYTES = 16 << 10

# item and name of a tensor
Where = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a checkpoint will hold.

    Args:
        items: by name (``model``, ``optimizer``); each with tensors gets a file of that name.
        step, tag, metrics, fingerprint, versions: as in `Manifest`.
    """

    step: int
    items: Mapping[str, Encoded]
    tag: str
    metrics: dict[str, float]
    fingerprint: str
    versions: dict[str, str]


def tensor_file(item: str) -> str:
    """Name of the file with an item's tensors."""
    return f"{item}.safetensors"


def contents(snapshot: Snapshot) -> Iterator[tuple[str, Callable[[Writable], None]]]:
    """(name, what writes it) of every file of the checkpoint but the manifest."""
    for item, encoded in snapshot.items.items():
        if encoded.tensors:
            yield tensor_file(item), partial(write_tensors, tensors=encoded.tensors)
    yield STATE, lambda sink: sink.write(_state_bytes(snapshot))


def state_bytes(trees: Mapping[str, Any]) -> bytes:
    """The file of what items are but for their tensors; `state_trees` reads it."""
    state = {"format": "actckpt.state", "format_version": STATE_VERSION, "items": dict(trees)}
    return json.dumps(state, allow_nan=False).encode("ascii")


def entries(snapshot: Snapshot) -> dict[str, FileEntry]:
    """Size and checksum of every file but the manifest; the bytes are hashed where they are."""
    found = {}
    for file, write in contents(snapshot):
        tally = _Tally()
        write(tally)
        found[file] = FileEntry(tally.size_bytes, tally.digest.checksum)
    return found


def without(snapshot: Snapshot, frozen: Collection[Where]) -> Snapshot:
    """What goes with a checkpoint whose frozen tensors lie beside it."""
    if not frozen:
        return snapshot
    items = {
        item: replace(
            encoded,
            tensors={k: t for k, t in encoded.tensors.items() if (item, k) not in frozen},
        )
        for item, encoded in snapshot.items.items()
    }
    return replace(snapshot, items=items)


def is_saved_as(snapshot: Snapshot, manifest: Manifest) -> bool:
    """Whether a checkpoint of one process holds this state; the bytes are hashed where they are."""
    frozen: dict[Where, str] = {}
    for name, chunk in manifest.in_base.items():
        item, _, key = name.partition("/")
        tensor = snapshot.items[item].tensors.get(key) if item in snapshot.items else None
        if tensor is None or key_of(tensor) != chunk.name:
            return False
        frozen[item, key] = chunk.name
    return manifest.files == entries(without(snapshot, frozen))


class _Tally:
    """Counts and hashes what passes."""

    def __init__(self) -> None:
        self.digest = Digest()
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size_bytes += len(view)


def size_bytes(snapshot: Snapshot) -> int:
    """About what the checkpoint takes on disk, known before anything is written; not less."""
    tensors = {(item, key): t for item, e in snapshot.items.items() for key, t in e.tensors.items()}
    # in the manifest and a file's head: names twice, shapes, offsets, checksums
    heads = sum(2 * (len(item) + len(key)) + 40 * t.dim() for (item, key), t in tensors.items())
    files = 2 + len({item for item, _ in tensors})
    return (
        sum(e.size_bytes for e in snapshot.items.values())
        + len(_state_bytes(snapshot))
        + heads
        + _ENTRY_BYTES * len(tensors)
        + _BLOCK_BYTES * files
    )


def _state_bytes(snapshot: Snapshot) -> bytes:
    return state_bytes({item: encoded.tree for item, encoded in snapshot.items.items()})
