"""`load_weights` where tensors share memory, modules load in their own way, or a file is mapped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from actckpt import (
    CheckpointMismatchError,
    load_weights,
)
from tests.weight_sources import (
    Net,
    as_pt,
    as_safetensors,
    assert_holds,
    copied,
    same,
    trained,
)


def test_either_name_of_a_tied_matrix_is_enough(tmp_path: Path) -> None:
    source = trained()
    for name in ("embedding.weight", "head.weight"):
        state = copied(source)
        del state[name]
        save_file(state, tmp_path / "x.safetensors")
        model = Net()
        load_weights(model, tmp_path / "x.safetensors")
        assert_holds(model, copied(source))
        assert model.head.weight is model.embedding.weight


def test_names_of_a_tied_matrix_that_differ_are_refused(tmp_path: Path) -> None:
    state = copied(trained())
    state["head.weight"] = state["head.weight"].clone()
    state["head.weight"][0, 0] += 1
    save_file(state, tmp_path / "x.safetensors")
    model = Net()
    before = copied(model)
    with pytest.raises(CheckpointMismatchError, match="one tensor in this model"):
        load_weights(model, tmp_path / "x.safetensors", strict=False)
    assert_holds(model, before)
    load_weights(model, tmp_path / "x.safetensors", names={"head.weight": None})
    assert_holds(model, copied(trained()))


class Views(nn.Module):
    """A part of a buffer, and a parameter that is another's matrix the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flat", torch.arange(8.0))
        self.register_buffer("head2", self.get_buffer("flat")[:2])
        self.e = nn.Parameter(torch.randn(3, 2))
        self.f = nn.Parameter(self.e.data.t())
        both = torch.zeros(2, 4)  # columns between each other, which share nothing
        self.register_buffer("left", both[:, :2])
        self.register_buffer("right", both[:, 2:])


@pytest.mark.parametrize("name", ["head2", "f"])
def test_values_for_one_memory_must_agree(name: str) -> None:
    model, source = Views(), Views()
    with torch.no_grad():
        for x in source.state_dict().values():
            x.add_(1)
    source.get_buffer("right").add_(1)
    load_weights(model, copied(source))
    assert_holds(model, copied(source))
    state = copied(source)
    state[name] = state[name] + 1
    before = copied(model)
    with pytest.raises(CheckpointMismatchError, match="share memory in this model"):
        load_weights(model, state)
    assert_holds(model, before)


def test_what_changes_through_another_is_not_said_to_be_kept() -> None:
    model = Views()
    state = {"flat": torch.ones(8), "right": torch.ones(2, 2), "e": torch.ones(3, 2)}
    report = load_weights(model, state, strict="shapes")
    assert report.changed == ("f", "head2")
    assert report.missing == ("left",)
    assert "changed through others whose memory they share (2): f, head2" in str(report)
    assert torch.equal(model.get_buffer("head2"), torch.ones(2))


# what a state dict holds, and modules do, beside tensors


class Counting(nn.Linear):
    """With a state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"count": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        raise AssertionError(state)


def test_extra_state_is_not_dropped_silently(tmp_path: Path) -> None:
    source = nn.ModuleDict({"a": Counting(2, 2)})
    torch.save(source.state_dict(), tmp_path / "x.pt")
    torch.save({"model": source.state_dict(), "epoch": 3}, tmp_path / "loop.pt")
    for what in (tmp_path / "x.pt", tmp_path / "loop.pt", source.state_dict()):
        model, plain = nn.ModuleDict({"a": Counting(2, 2)}), nn.ModuleDict({"a": nn.Linear(2, 2)})
        before = copied(plain)
        with pytest.raises(CheckpointMismatchError, match=r"nothing for 1: a\._extra_state"):
            load_weights(plain, what)
        with pytest.raises(CheckpointMismatchError, match=r"model.load_state_dict\(\) loads it"):
            load_weights(model, what)
        assert_holds(plain, before)
        load_weights(plain, what, names={"a._extra_state": None})
        report = load_weights(model, what, strict="shapes")
        assert report.missing == report.unexpected == ("a._extra_state",)
        assert same(model.state_dict()["a.weight"], source.state_dict()["a.weight"])
        assert_holds(plain, {k: v for k, v in source.state_dict().items() if "extra" not in k})


class Doubling(nn.Linear):
    """Which stores half of its weights."""

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state, prefix, *args)


def hooked() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_load_state_dict_pre_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("make", [lambda: Doubling(2, 2), hooked])
def test_modules_that_load_in_their_own_way_are_named(make: Callable[[], nn.Module]) -> None:
    model = nn.ModuleDict({"a": make(), "norm": nn.BatchNorm1d(2)})
    before = copied(model)
    state = {name: x + 1 for name, x in before.items()}
    with pytest.raises(CheckpointMismatchError, match=r"and this does not: a\n"):
        load_weights(model, state)
    assert_holds(model, before)
    report = load_weights(model, state, strict="shapes")
    assert report.not_run == ("a",)
    assert "own loading of modules, not run (1): a" in str(report)
    assert_holds(model, state)


# traps


@pytest.mark.parametrize("ending", ["_scale_inv", "_scale"])
def test_a_weight_in_8_bits_is_not_cast_without_its_scale(ending: str) -> None:
    model = Net()
    before = copied(model)
    state = copied(trained())
    state["module.weight"] = state["module.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointMismatchError, match=f"multiplied by a.module.weight{ending}:"):
        load_weights(
            model,
            {f"a.{k}": v for k, v in state.items()}
            | {f"a.module.weight{ending}": torch.ones(1, 1)},
            strict="shapes",
            names={"a.": ""},
        )
    assert_holds(model, before)
    load_weights(model, state)  # there is none: what it holds is what it means


def test_a_file_copied_over_later_changes_nothing(tmp_path: Path) -> None:
    """What safetensors and torch map is copied: a map is of the file as it will be."""
    for write in (as_safetensors, as_pt):
        source, model = trained(), Net()
        path = write(source, tmp_path)
        load_weights(model, path)
        with open(path, "r+b") as file:
            file.write(b"\0" * path.stat().st_size)
            os.fsync(file.fileno())
        assert_holds(model, copied(source))


def test_weights_loaded_inside_autocast_are_used_at_once(tmp_path: Path) -> None:
    """Which keeps casts of parameters until its context ends."""
    source, model = trained().eval(), Net().eval()
    path = as_pt(source, tmp_path)
    x = torch.tensor([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        load_weights(model, path)
        after = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(after, source(x))
    assert not same(before, after)
