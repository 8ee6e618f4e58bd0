"""Folders of torch.distributed.checkpoint: read as torch's own reader would, and nothing is run."""

from __future__ import annotations

import builtins
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import actckpt
from actckpt.errors import CheckpointError, CheckpointFormatError, WeightsExportError
from actckpt.foreign.chunks import Chunk, assembled
from actckpt.foreign.dcp import METADATA, read_dcp
from actckpt.foreign.restricted_pickle import restricted_load
from actckpt.foreign.stored import StoredTensor
from actckpt.importing.loading import load_weights
from actckpt.importing.source import weights_in
from tests.saved_by_ranks import Sharded

ROOT = Path(__file__).parent.parent


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Dtype, shape and every bit."""
    flat = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def state() -> dict[str, Any]:
    """One of everything that people save."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optim": optimizer.state_dict(),
        "more": {
            "zero": torch.tensor(-0.0),
            "none": torch.empty(0, 3),
            "half": torch.rand(5).bfloat16(),
            "eighth": torch.rand(5).to(torch.float8_e4m3fn),
            "complex": torch.rand(2, dtype=torch.complex64),
            "nan": torch.tensor([float("nan"), float("inf")]),
        },
        "step": 5,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that torch has written."""
    with pytest.warns(UserWarning, match="torch.distributed is"):
        save(state(), checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have written of a sharded model."""
    path = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.saved_by_ranks", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def assert_same_tree(found: Any, wanted: Any) -> None:
    """Structure and bits."""
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, StoredTensor)
        assert (found.shape, found.dtype) == (tuple(wanted.shape), wanted.dtype)
        assert same(found.read(), wanted)
    elif isinstance(wanted, dict):
        assert set(found) == {str(key) for key in wanted}
        for key, value in wanted.items():
            assert_same_tree(found[str(key)], value)
    elif isinstance(wanted, list) and wanted and isinstance(wanted[0], dict):
        assert_same_tree(found, dict(enumerate(wanted)))
    else:
        assert found.read() == wanted


def test_what_torch_wrote_is_read_bit_for_bit(folder: Path) -> None:
    assert_same_tree(read_dcp(folder), state())


def test_what_two_ranks_wrote_is_read_whole(sharded: Path) -> None:
    wanted = load_file(sharded / "expected.safetensors")
    found = weights_in(read_dcp(sharded / "dcp"), None, "dcp")
    assert found.keys() == wanted.keys()
    assert all(same(found[name].read(), x) for name, x in wanted.items())
    model = Sharded()
    report = load_weights(model, sharded / "dcp")
    assert all(same(x, wanted[name]) for name, x in model.state_dict().items())
    assert model.head.weight is model.embedding.weight
    assert report.tied == (("embedding.weight", "head.weight"),)


def test_into_a_sharded_model(sharded: Path) -> None:
    """Every rank takes its share of what it reads."""
    wanted = load_file(sharded / "expected.safetensors")
    loaded = load_file(sharded / "loaded-6.safetensors")
    assert loaded.keys() == wanted.keys()
    assert all(same(loaded[name], x) for name, x in wanted.items())


def test_a_run_of_many_ranks_begins_with_weights_on_all_or_none(sharded: Path) -> None:
    for rank in range(2):
        error, *then = (sharded / f"begun-{rank}.txt").read_text(encoding="utf-8").splitlines()
        assert "does not exist" in error
        assert error.startswith("rank 1: ") is (rank == 0)
        assert then == ["nothing", "a folder of torch.distributed.checkpoint"]


def test_shards_in_safetensors_files_are_read_whole(sharded: Path) -> None:
    """What torch leaves where it does not consolidate, or was killed before."""
    wanted = load_file(sharded / "expected.safetensors")
    model = Sharded()
    report = load_weights(model, sharded / "safetensors")
    assert report.kind == "shards of torch.distributed.checkpoint, of 2 processes"
    assert all(same(x, wanted[name]) for name, x in model.state_dict().items())


def test_shards_of_which_one_is_missing(sharded: Path, tmp_path: Path) -> None:
    first, second = sorted((sharded / "safetensors").iterdir())
    for kept in (first, second):
        folder = tmp_path / kept.stem
        folder.mkdir()
        shutil.copy(kept, folder)
        model = Sharded()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        for path in (folder, folder / kept.name):
            with pytest.raises(CheckpointFormatError, match="the shard of one process"):
                load_weights(model, path, strict=False)
        assert all(same(x, before[name]) for name, x in model.state_dict().items())
    # of three, the second
    shutil.copy(second, folder / second.name.replace("00002", "00003"))
    shutil.copy(first, folder)
    (folder / second.name).unlink()
    with pytest.raises(CheckpointFormatError, match="up to 3, but not of 2"):
        load_weights(model, folder, strict=False)


# the way out


def test_what_is_exported_torch_loads_and_is_loaded_here(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = Sharded()
    actckpt.export(source, tmp_path / "out", format="dcp")
    seen = {name: torch.zeros_like(x) for name, x in source.state_dict().items()}
    with pytest.warns(UserWarning, match="torch.distributed is"):
        load(seen, checkpoint_id=tmp_path / "out", no_dist=True)
    model = Sharded()
    load_weights(model, tmp_path / "out")
    for name, x in source.state_dict().items():
        assert same(seen[name], x)
        assert same(model.state_dict()[name], x)


def test_an_export_that_torch_could_not_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it raises then is no Exception."""

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WeightsExportError, match="No space left"):
        actckpt.export(Sharded(), tmp_path / "out", format="dcp")
    assert list(tmp_path.iterdir()) == []


# damage


def test_a_turned_bit_is_found_that_torch_does_not_see(folder: Path) -> None:
    """In the values of a tensor, wherever in the file it is."""
    wanted = state()["model"]["weight"].numpy().tobytes()
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[content.index(wanted)] ^= 1
    file.write_bytes(content)
    seen: dict[str, Any] = {"model": {"weight": torch.empty(4, 3)}}
    with pytest.warns(UserWarning, match="torch.distributed is"):
        load(seen, checkpoint_id=folder)
    assert not torch.equal(seen["model"]["weight"], state()["model"]["weight"])
    with pytest.raises(CheckpointFormatError, match="not what was written"):
        read_dcp(folder)["model"]["weight"].read()


def without_metadata(folder: Path) -> None:
    (folder / METADATA).unlink()


def with_half_the_metadata(folder: Path) -> None:
    path = folder / METADATA
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_empty_metadata(folder: Path) -> None:
    (folder / METADATA).write_bytes(b"")


def with_other_metadata(folder: Path) -> None:
    (folder / METADATA).write_bytes(pickle.dumps([1, 2]))


def without_values(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def with_half_the_values(folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(folder: Path, change: Callable[[Any], None]) -> None:
    """Metadata as torch writes it, with something in it changed."""
    path = folder / METADATA
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def with_a_file_outside(folder: Path) -> None:
    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "../dcp/__0_0.distcp"

    changed(folder, change)


def with_huge_tensors(folder: Path) -> None:
    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["model.weight"]
        entry.size = torch.Size([2**40, 3])
        entry.chunks[0].sizes = torch.Size([2**40, 3])

    changed(folder, change)


def with_part_of_a_tensor(folder: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata["model.weight"].size = torch.Size([5, 3])

    changed(folder, change)


def with_negative_places(folder: Path) -> None:
    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.offset = -1

    changed(folder, change)


def with_odd_offsets(folder: Path) -> None:
    def change(metadata: Any) -> None:
        for index in metadata.storage_data:
            object.__setattr__(index, "offset", [[]])

    changed(folder, change)


def with_deep_nesting(folder: Path) -> None:
    """Which cannot even be printed."""
    (folder / METADATA).write_bytes(b"]" + b"\x85" * 100_000 + b".")


DAMAGES = [
    without_metadata, with_half_the_metadata, with_empty_metadata, with_other_metadata,
    without_values, with_half_the_values, with_a_file_outside, with_huge_tensors,
    with_part_of_a_tensor, with_negative_places,
    with_odd_offsets, with_deep_nesting,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_one_error_and_changes_nothing(
    damage: Callable[[Path], None], folder: Path
) -> None:
    damage(folder)
    model = nn.Linear(3, 4)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_weights(model, folder)
    assert all(same(x, before[name]) for name, x in model.state_dict().items())


def test_metadata_cut_anywhere_and_changed_anywhere(folder: Path) -> None:
    """One error, or what can be read is read; never another exception."""
    path = folder / METADATA
    content = path.read_bytes()
    for at in range(0, len(content), 31):
        path.write_bytes(content[:at])
        with pytest.raises(CheckpointFormatError):
            read_dcp(folder)
        path.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        with suppress(CheckpointFormatError):
            for leaf in weights_in(read_dcp(folder), "model", "changed").values():
                leaf.read()


@pytest.mark.parametrize("begins", [2, 5, 4])
def test_chunks_that_overlap_or_leave_a_gap(begins: int) -> None:
    """As many elements as the tensor has, and not each of them."""

    def chunk(begin: int, size: int) -> Chunk:
        return Chunk((begin,), StoredTensor((size,), torch.float32, lambda: torch.ones(size)))

    chunks = [chunk(0, 4), chunk(begins, 3)]
    if begins == 4:
        assert torch.equal(assembled("x", (7,), torch.float32, chunks).read(), torch.ones(7))
    elif begins == 5:
        with pytest.raises(CheckpointFormatError, match="not all of it"):
            assembled("x", (8,), torch.float32, chunks)
    else:
        with pytest.raises(CheckpointFormatError, match="overlap"):
            assembled("x", (7,), torch.float32, chunks).read()


# hostile metadata


class Calls:
    """Pickled as a call of something."""

    def __init__(self, what: Any, *args: Any) -> None:
        self.call = what, args

    def __reduce__(self) -> Any:
        return self.call


NAMED = [
    (Calls(os.getcwd), "posix.getcwd"),
    (Calls(builtins.print, "run"), "builtins.print"),
    (Calls(getattr, "text", "upper"), "builtins.getattr"),
    (Calls(nn.Linear, 3, 3), "torch.nn.modules.linear.Linear"),
    (Calls(FileSystemReader, "x"), "torch.distributed.checkpoint.filesystem.FileSystemReader"),
]


@pytest.mark.parametrize(("named", "name"), NAMED, ids=[name for _, name in NAMED])
def test_metadata_that_names_anything_else_is_refused(
    named: Calls, name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = pickle.loads((folder / METADATA).read_bytes())
    metadata.planner_data = [named]
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointFormatError) as raised:
        load_weights(nn.Linear(3, 4), folder)
    assert f"names {name}," in str(raised.value)
    assert capsys.readouterr().out == ""


def test_no_class_can_be_changed_by_a_pickle() -> None:
    """Not those of torch, which a pickle can give attributes, nor what stands for them."""
    # the class Metadata; BUILD with (None, {"version": "set"})
    attack = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(dVversion\nVset\nstb."
    version = Metadata.version
    try:
        pickle.loads(attack)
        assert Metadata.version == "set"
    finally:
        Metadata.version = version
    with pytest.raises(CheckpointFormatError):
        restricted_load(attack, "attack")
    found = restricted_load(b"ctorch.distributed.checkpoint.metadata\nMetadata\n.", "found")
    assert (found.__name__, found is Metadata, hasattr(found, "version")) == (
        "Metadata", False, False
    )  # fmt: skip
    assert Metadata.version == version


def test_a_number_in_a_pickle_takes_no_memory() -> None:
    """LONG_BINPUT with the largest index there is, on which the one of C would allocate."""
    assert restricted_load(b"Nr\xff\xff\xff\xff.", "memo") is None


def test_the_values_are_no_pickles_either(folder: Path) -> None:
    """What is no tensor is read with weights_only, too."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    info = next(i for k, i in metadata.storage_data.items() if k.fqn == "step")
    file = folder / info.relative_path
    content = file.read_bytes()
    torch.save(Calls(os.getcwd), folder / "hostile")
    hostile = (folder / "hostile").read_bytes()
    file.write_bytes(content + hostile)
    info.offset, info.length = len(content), len(hostile)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointFormatError, match=r"posix\.getcwd"):
        read_dcp(folder)["step"].read()
