"""A rank's share of a checkpoint: files of its own, hashed, and the manifest that names them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from actckpt.checkpoint.dtypes import name_of
from actckpt.checkpoint.encoding import Encoded
from actckpt.checkpoint.files import Files, Sink
from actckpt.checkpoint.manifest import Chunk, FileEntry, TensorEntry
from actckpt.checkpoint.names import rank_file, share_file, state_file
from actckpt.checkpoint.rank_manifest import RankManifest
from actckpt.checkpoint.snapshot import Snapshot, state_bytes
from actckpt.checkpoint.tensor_file import write_tensors
from actckpt.checkpoint.verification import verify_share
from actckpt.sharded.assignment import Assignment


def write_share(
    files: Files,
    directory: str,
    snapshot: Snapshot,
    assignment: Assignment,
    *,
    rank: int,
    save: str,
    verify: str,
) -> tuple[RankManifest, FileEntry]:
    """What was written, durable and read back, and what the rank's manifest is as a file.

    Args:
        directory: exists, and is the save's own.
        save: what tells this save from every other.
        verify: what is read back, as for `verify_files`.

    Raises:
        OSError, CheckpointError: it could not be.
    """
    left_out = {*assignment.skipped}
    entries: dict[str, FileEntry] = {}
    blocks: dict[str, bytes] = {}
    tensors: dict[str, TensorEntry] = {}
    own: dict[str, TensorEntry] = {}

    def written(file: str, sink: Sink) -> None:
        entries[file] = FileEntry(sink.written_bytes, sink.checksum)
        blocks[file] = sink.blocks

    # all are made durable once the last is written: meanwhile the device works on the first
    with ExitStack() as writing:
        for item, encoded in snapshot.items.items():
            mine = {
                key: entry
                for key, tensor in encoded.tensors.items()
                if f"{item}/{key}" not in left_out
                and (entry := _entry(encoded, key, share_file(item, rank))) is not None
            }
            if not mine:
                continue
            for key, entry in mine.items():
                name = f"{item}/{key}"
                (own if name in assignment.own else tensors)[name] = entry
            file = share_file(item, rank)
            sink = writing.enter_context(files.writing(f"{directory}/{file}"))
            write_tensors(sink, {key: encoded.tensors[key] for key in mine})
            written(file, sink)
        trees = _trees(snapshot, assignment, rank)
        if trees:
            sink = writing.enter_context(files.writing(f"{directory}/{state_file(rank)}"))
            sink.write(state_bytes(trees))
            written(state_file(rank), sink)
    share = RankManifest(
        rank,
        save,
        entries,
        blocks,
        (*trees,),
        # in the order in which `expected` has them
        dict(sorted(tensors.items())),
        own,
        assignment.without,
    )
    with files.writing(f"{directory}/{rank_file(rank)}") as sink:
        sink.write(share.to_bytes())
    files.sync_directory(directory)
    verify_share(files, directory, share, verify)
    return share, FileEntry(sink.written_bytes, sink.checksum)


def why_not(files: Files, directory: str, error: Exception) -> str:
    """Why a share could not be written, where that is not what the error says; "" otherwise."""
    try:
        if not isinstance(error, OSError) or files.status(directory) is not None:
            return ""
    except OSError:
        return ""
    return (
        f"{directory}, which rank 0 has made, is not there: every rank has to be given the same "
        "directory, on a file system that all of them share"
    )


def _trees(snapshot: Snapshot, assignment: Assignment, rank: int) -> dict[str, Any]:
    if rank == 0:
        return {item: e.tree for item, e in snapshot.items.items()}
    return {item: snapshot.items[item].tree for item in assignment.trees}


def _entry(encoded: Encoded, key: str, file: str) -> TensorEntry | None:
    """The part that is here, in a file; None where nothing of the tensor is."""
    tensor = encoded.tensors[key]
    part = tuple(tensor.shape)
    shard = encoded.shards.get(key)
    shape = part if shard is None else shard.shape
    offset = (0,) * len(part) if shard is None else shard.offset
    if not tensor.numel() and part != shape:
        return None
    return TensorEntry(name_of(tensor.dtype), shape, (Chunk(file, key, offset, part),))
