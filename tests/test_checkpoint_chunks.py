"""Tensors stored in pieces: any tiling is put together, anything else is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from actckpt.checkpoint.files import Files
from actckpt.checkpoint.manifest import Chunk, FileEntry, TensorEntry
from actckpt.checkpoint.names import MANIFEST
from actckpt.checkpoint.reading import read_state
from actckpt.checkpoint.tensor_file import write_tensors
from actckpt.checkpoint.verification import read_manifest
from actckpt.errors import CheckpointFormatError
from tests.test_checkpoint_corruption import make
from tests.test_checkpoint_encoding import same

# of a dtype that safetensors has, and of one that is stored as bytes
WHOLE = {
    "plain": torch.arange(150, dtype=torch.float32).reshape(50, 3),
    "bytes": torch.arange(150).to(torch.complex128).reshape(50, 3),
}
Box = tuple[tuple[int, int], tuple[int, int]]
GRID: tuple[Box, ...] = (
    ((0, 20), (0, 2)), ((0, 20), (2, 1)), ((20, 30), (2, 1)), ((20, 30), (0, 2)),
)  # fmt: skip


def store(directory: Path, whole: torch.Tensor, boxes: Iterable[Box]) -> Path:
    """A checkpoint whose ``model/a`` lies in boxes of (offset, size) per dimension, by turns in
    two files."""
    path = make(directory)
    manifest = read_manifest(Files(), str(path))
    pieces: dict[str, dict[str, torch.Tensor]] = {
        "part-0.safetensors": {},
        "part-1.safetensors": {},
    }
    chunks = []
    for i, box in enumerate(boxes):
        file, name = f"part-{i % 2}.safetensors", f"a@{i}"
        pieces[file][name] = whole[tuple(slice(o, o + n) for o, n in box)]
        chunks.append(Chunk(file, name, tuple(o for o, _ in box), tuple(n for _, n in box)))
    files = dict(manifest.files)
    for file, tensors in pieces.items():
        with Files().writing(f"{path}/{file}") as sink:
            write_tensors(sink, tensors)
        files[file] = FileEntry(sink.written_bytes, sink.checksum)
    entry = TensorEntry(str(whole.dtype).removeprefix("torch."), tuple(whole.shape), tuple(chunks))
    # the file that it was in keeps the other tensor alone
    (path / "model.safetensors").unlink()
    with Files().writing(f"{path}/model.safetensors") as sink:
        write_tensors(sink, {"b": torch.zeros(7, dtype=torch.int8)})
    files["model.safetensors"] = FileEntry(sink.written_bytes, sink.checksum)
    changed = dataclasses.replace(
        manifest, files=files, tensors={**manifest.tensors, "model/a": entry}
    )
    (path / MANIFEST).write_bytes(changed.to_bytes())
    return path


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize(
    "boxes",
    [
        GRID,
        (((0, 50), (0, 1)), ((0, 50), (1, 2))),
        tuple(((i, 1), (0, 3)) for i in reversed(range(50))),
        (((0, 50), (0, 3)), ((50, 0), (0, 3)), ((0, 0), (3, 0))),
    ],
    ids=["grid", "columns", "rows", "empty"],
)
def test_any_tiling_is_put_together(boxes: tuple[Box, ...], kind: str, tmp_path: Path) -> None:
    path = store(tmp_path, WHOLE[kind], boxes)
    assert same(read_state(Files(), str(path))[1]["model"]["a"], WHOLE[kind])


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (GRID[:3], "chunks do not make up"),
        ((*GRID, ((0, 1), (0, 1))), "chunks do not make up"),
        # as many elements, but the third column twice and the first two not at all
        ((*GRID[:2], ((20, 30), (2, 1)), ((0, 30), (1, 2))), "overlap"),
    ],
    ids=["gap", "too much", "overlap"],
)
def test_what_is_no_tiling_is_refused(boxes: tuple[Box, ...], message: str, tmp_path: Path) -> None:
    path = store(tmp_path, WHOLE["plain"], boxes)
    with pytest.raises(CheckpointFormatError, match=f"model/a.*{message}.*[Uu]se another"):
        read_state(Files(), str(path))
