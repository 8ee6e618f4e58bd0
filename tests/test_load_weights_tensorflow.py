"""Checkpoints that TensorFlow 2.21 has written (`tests/written_by_tensorflow`), without it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from actckpt import CheckpointError, CheckpointFormatError, load_weights
from actckpt.importing.crc32c import crc32c
from actckpt.importing.tensorflow import read_tensorflow

WRITTEN = Path(__file__).parent / "written_by_tensorflow"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Dtype, shape and every bit."""
    flat = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@pytest.mark.parametrize(("name", "count"), [("object", 6), ("named.ckpt-3", 60)])
def test_every_variable_is_read_as_tensorflow_reads_it(name: str, count: int) -> None:
    wanted = load_file(WRITTEN / f"{name}.expected.safetensors")
    found = read_tensorflow(WRITTEN / f"{name}.index")
    assert len(found) == len(wanted) == count
    for key, x in wanted.items():
        assert same(found[key.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE")].read(), x), key


def test_checksums_of_any_length() -> None:
    """The register byte by byte, and the known value."""

    def slow(data: bytes) -> int:
        word = 0xFFFFFFFF
        for value in data:
            word ^= value
            for _ in range(8):
                word = word >> 1 ^ (0x82F63B78 if word & 1 else 0)
        return word ^ 0xFFFFFFFF

    assert crc32c(b"123456789") == 0xE3069283
    data = random.Random(1).randbytes(5000)
    for length in (0, 1, 63, 64, 127, 128, 129, 255, 1024, 5000):
        assert crc32c(data[:length]) == slow(data[:length])


class Layer(nn.Module):
    """What the kernel, as TensorFlow lays it out, belongs into."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)


NAMES = {"model/kernel": "linear.weight", "model/bias": "linear.bias"}


@pytest.mark.parametrize("path", ["object", "object.index"])
def test_into_a_model_by_names_and_layouts(path: str) -> None:
    model = Layer()
    report = load_weights(
        model, WRITTEN / path, names=NAMES, transposed=["*.weight"], strict="shapes"
    )
    wanted = load_file(WRITTEN / "object.expected.safetensors")
    kernel = wanted["model/kernel/.ATTRIBUTES/VARIABLE_VALUE"]
    assert same(model.linear.weight, kernel.T)
    assert same(model.linear.bias, wanted["model/bias/.ATTRIBUTES/VARIABLE_VALUE"])
    assert set(report.unexpected) == {"model/half", "model/step", "model/flag", "model/empty"}
    assert report.kind == "a checkpoint of TensorFlow"


def test_the_newest_of_a_folder(tmp_path: Path) -> None:
    for path in WRITTEN.glob("*.*-*"):
        shutil.copy(path, tmp_path)
    for path in WRITTEN.glob("object.*"):
        shutil.copy(path, tmp_path)
    layers = {"bert/encoder/layer_5/attention/self/query/kernel": "weight"}
    with pytest.raises(CheckpointError, match="no weights of a kind that is known"):
        load_weights(nn.Linear(3, 2, bias=False), tmp_path, strict="shapes", names=layers)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "named.ckpt-3"\n')
    model = nn.Linear(3, 2, bias=False)
    load_weights(model, tmp_path, strict="shapes", names=layers)
    wanted = load_file(WRITTEN / "named.ckpt-3.expected.safetensors")
    assert same(model.weight, wanted[next(iter(layers))])


# damage


def without_values(folder: Path) -> None:
    next(folder.glob("object.data*")).unlink()


def with_short_values(folder: Path) -> None:
    path = next(folder.glob("object.data*"))
    path.write_bytes(path.read_bytes()[:20])


def with_turned_values(folder: Path) -> None:
    path = next(folder.glob("object.data*"))
    wanted = load_file(WRITTEN / "object.expected.safetensors")
    kernel = wanted["model/kernel/.ATTRIBUTES/VARIABLE_VALUE"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(kernel)] ^= 1
    path.write_bytes(content)


def with_short_index(folder: Path) -> None:
    path = folder / "object.index"
    path.write_bytes(path.read_bytes()[:-1])


def with_empty_index(folder: Path) -> None:
    (folder / "object.index").write_bytes(b"")


DAMAGES = [
    without_values, with_short_values, with_turned_values, with_short_index, with_empty_index
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_one_error_and_changes_nothing(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    for path in WRITTEN.glob("object.*"):
        shutil.copy(path, tmp_path)
    damage(tmp_path)
    model = Layer()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointFormatError):
        load_weights(
            model, tmp_path / "object", names=NAMES, transposed=["*.weight"], strict="shapes"
        )
    assert all(same(x, before[name]) for name, x in model.state_dict().items())


def test_an_index_changed_anywhere_is_read_as_it_was_or_refused(tmp_path: Path) -> None:
    content = (WRITTEN / "object.index").read_bytes()
    wanted = {name: str(x) for name, x in read_tensorflow(WRITTEN / "object.index").items()}
    read = 0
    for at in range(len(content)):
        path = tmp_path / "object.index"
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with suppress(CheckpointFormatError):
            assert {name: str(x) for name, x in read_tensorflow(path).items()} == wanted
            read += 1
    # no more than what has no checksum: the footer but its mark, and a block of no use here
    assert read <= 40 + 13


def test_partitions_are_refused_by_name() -> None:
    with pytest.raises(CheckpointFormatError, match="sliced in partitions"):
        load_weights(Layer(), WRITTEN / "partitioned.ckpt", strict=False)
