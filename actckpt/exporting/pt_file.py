"""One file of torch's own, ``model.pt``: a state dict that ``weights_only=True`` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, cast

import torch
from torch import nn

from actckpt.checkpoint.files import Sink
from actckpt.exporting.folder import Folder
from actckpt.exporting.outputs import Run
from actckpt.exporting.prepared import Asked, Prepared
from actckpt.exporting.safetensors_file import loaded_into
from actckpt.exporting.source import Source
from actckpt.exporting.weights import check_same

NAME = "model.pt"


def prepare(source: Source, asked: Asked) -> Prepared:
    """Every persistent tensor under its name; tied ones share their memory in the file, too."""
    again = {name for group in source.table.tied for name in group[1:]}
    sizes = {n: w.size_bytes for n, w in source.table.weights.items() if w.role != "non-persistent"}
    tensors = _compact(source.table.persistent())

    def write(folder: Folder) -> list[str]:
        with folder.writing(NAME) as sink:
            written = _Written(sink)
            try:
                torch.save(tensors, cast(IO[bytes], written))
            except RuntimeError:
                # torch's own end of a file that could not be written hides why
                if written.failed is not None:
                    raise written.failed from None
                raise
        _check(f"{folder.path}/{NAME}", tensors)
        return []

    return Prepared(
        source.table, sum(size for name, size in sizes.items() if name not in again), write
    )


class _Written:
    """What torch writes to."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.failed: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self._sink.write(data)
        except BaseException as error:
            self.failed = error
            raise
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        pass  # nothing is held back


def _compact(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors on the CPU, none of which would take a whole storage along that it is a part of."""
    made: dict[tuple[int, ...], torch.Tensor] = {}
    found = {}
    for name, x in tensors.items():
        window = (x.data_ptr(), *x.shape, -1, *x.stride())
        if not x.numel() or window not in made:
            whole = x.untyped_storage().nbytes() == x.numel() * x.itemsize
            made[window] = x.cpu() if whole else x.cpu().clone()
        found[name] = made[window]
    return found


def _check(path: str, expected: Mapping[str, torch.Tensor]) -> None:
    found = torch.load(path, weights_only=True, mmap=True)
    check_same(found, expected, NAME)


def consumer(path: Path, model: nn.Module) -> Run:
    """What runs an exported folder: another model of the class, which has loaded it."""
    return loaded_into(model, torch.load(path / NAME, weights_only=True))
