"""Folders that DeepSpeed 0.19.8 has written (`tests/written_by_deepspeed`), read without it."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actckpt import CheckpointError, load_weights
from actckpt.foreign.deepspeed import read_deepspeed
from actckpt.foreign.deepspeed_files import _CLASSES
from actckpt.foreign.torch_file import Standin, load_torch_file
from tests.written_by_deepspeed.make import TAG, Net

WRITTEN = Path(__file__).parent / "written_by_deepspeed"
KINDS = ("zero1", "zero2", "zero3", "universal2", "universal3")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.fixture(autouse=True)
def no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not here, even where somebody has installed it."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_moments_are_those_of_the_live_engine(kind: str) -> None:
    found = read_deepspeed(WRITTEN / kind)
    wanted = load_file(WRITTEN / f"zero{kind[-1]}.expected.safetensors")
    assert len(wanted) == 12
    for key, x in wanted.items():
        which, _, name = key.partition("/")
        assert same(found["model" if which == "fp32" else which][name].read(), x), key
    # that which none of the optimizer's groups holds
    assert same(found["model"]["count"].read(), torch.tensor(3.5))
    assert found["model"]["norm.bias"].read().float().tolist() == [0.0, 0.0, 0.0]
    assert same(found["model"]["head.weight"].read(), wanted["fp32/embedding.weight"])


@pytest.mark.parametrize("where", ["newest", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_into_a_model(kind: str, where: str) -> None:
    model = Net()
    report = load_weights(model, WRITTEN / kind if where == "newest" else WRITTEN / kind / TAG)
    wanted = load_file(WRITTEN / f"zero{kind[-1]}.expected.safetensors")
    for name, x in model.state_dict().items():
        if f"fp32/{name}" in wanted:
            assert same(x, wanted[f"fp32/{name}"])
    assert model.head.weight is model.embedding.weight
    assert same(model.head.weight.detach(), wanted["fp32/embedding.weight"])
    assert report.tied == (("embedding.weight", "head.weight"),)
    assert report.kind == "a ZeRO checkpoint of DeepSpeed"
    assert report.missing == report.unexpected == ()


# damaged, incomplete, hostile


class Hostile:
    """Pickled as a call."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __reduce__(self) -> Any:
        return os.getcwd, ()


def without_a_rank(step: Path) -> None:
    sorted(step.glob("*_optim_states.pt"))[-1].unlink()


def without_the_first(step: Path) -> None:
    sorted(step.glob("*_optim_states.pt"))[0].unlink()


def without_the_model(step: Path) -> None:
    for path in step.glob("*_model_states.pt"):
        path.unlink()


def without_the_step(step: Path) -> None:
    shutil.rmtree(step)


def with_another_step(step: Path) -> None:
    (step.parent / "latest").write_text("../elsewhere")


def cut_short(step: Path) -> None:
    path = next(step.glob("*_optim_states.pt"))
    path.write_bytes(path.read_bytes()[:-30])


def with_a_turned_bit(step: Path) -> None:
    wanted = load_file(WRITTEN / "zero2.expected.safetensors")["fp32/embedding.weight"]
    first = wanted.flatten()[:2].numpy().tobytes()
    where = next(p for p in step.glob("*_optim_states.pt") if first in p.read_bytes())
    content = bytearray(where.read_bytes())
    content[content.index(first)] ^= 1
    where.write_bytes(content)


def with_hostile_classes(step: Path) -> None:
    path = next(step.glob("*_optim_states.pt"))
    torch.save({"optimizer_state_dict": Hostile()}, path)


def of_a_pipeline(step: Path) -> None:
    (step / "layer_00-model_states.pt").write_bytes(b"")


def of_other_shapes(step: Path) -> None:
    path = step / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)
    state["param_shapes"][0]["embedding.weight"] = torch.Size([500, 3])
    torch.save(state, path)


def with_sparse_parts(step: Path) -> None:
    for path in step.glob("*_optim_states.pt"):
        with torch.serialization.safe_globals([(Hostile, name) for name in _CLASSES]):
            state = torch.load(path, weights_only=True)
        shares = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        whole = {
            "single_partition_of_fp32_groups": [x.to_sparse() for x in shares],
            "base_optimizer_state": {"state": {0: {}, 1: {}}},
            "partition_count": [2, 2],
        }
        torch.save({"optimizer_state_dict": whole}, path)


def of_nothing(step: Path) -> None:
    torch.save([1], step / "mp_rank_00_model_states.pt")


DAMAGES: dict[Callable[[Path], None], str] = {
    without_a_rank: "saved by 2",
    without_the_first: "lacks a file of rank 0",
    without_the_model: "no model states",
    without_the_step: "which is not there",
    with_another_step: "names no folder beside it",
    cut_short: "damaged",
    with_a_turned_bit: "not what was written",
    with_hostile_classes: "posix.getcwd",
    of_a_pipeline: "pipeline stages",
    of_other_shapes: "elements of",
    with_sparse_parts: "layout",
    of_nothing: "no file of DeepSpeed",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_one_error_and_changes_nothing(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    shutil.copytree(WRITTEN / "zero2", tmp_path / "zero2")
    damage(tmp_path / "zero2" / TAG)
    model = Net()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        load_weights(model, tmp_path / "zero2")
    assert DAMAGES[damage] in str(raised.value)
    assert all(same(x, before[name]) for name, x in model.state_dict().items())


# files of another structure


def places(x: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in dicts and lists."""
    yield path
    if isinstance(x, dict):
        for key in x:
            yield from places(x[key], (*path, key))
    elif isinstance(x, list):
        for number, value in enumerate(x):
            yield from places(value, (*path, number))


def without_standins(x: Any) -> Any:
    """What can be saved again."""
    if isinstance(x, dict):
        return {key: without_standins(value) for key, value in x.items()}
    if isinstance(x, list):
        return [without_standins(value) for value in x]
    return None if isinstance(x, Standin) else x


ODD = [
    None, 0, -1, "x", [], {}, [None], torch.zeros(0), torch.zeros(2, 3), (1, 2), {"a": [1]},
    torch.Size([2**40, 2**40]), torch.zeros(3, dtype=torch.int64),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3", "universal3"])
def test_anything_in_the_place_of_anything(kind: str, tmp_path: Path) -> None:
    """One error and the model untouched, or what is there is loaded; no other exception."""
    draw = random.Random(kind)
    refused = 0
    for number in range(40):
        folder = tmp_path / str(number)
        shutil.copytree(WRITTEN / kind, folder)
        path = draw.choice(sorted((folder / TAG).glob("*_states.pt")))
        # its tensors are windows on the file that they are from
        written = WRITTEN / kind / TAG / path.name
        state = without_standins(load_torch_file(written, _CLASSES))
        *outer, last = draw.choice([
            p for p in places(state) if p and not {"ds_config", "param_groups"} & set(p)
        ])  # fmt: skip
        target = state
        for key in outer:
            target = target[key]
        target[last] = draw.choice(ODD)
        torch.save(state, path)
        model = Net()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        try:
            load_weights(model, folder, strict="shapes")
        except CheckpointError:
            refused += 1
            assert all(same(x, before[name]) for name, x in model.state_dict().items())
    assert 5 < refused < 40
