"""`load_weights`: from every kind of file, all that was asked for or nothing, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt import (
    ArgumentError,
    CheckpointError,
    CheckpointMismatchError,
    load_weights,
)
from tests.weight_sources import (
    SOURCES,
    Net,
    as_pt,
    assert_holds,
    copied,
    same,
    trained,
)


@pytest.mark.parametrize("write", SOURCES, ids=lambda write: write.__name__)
def test_every_source_is_loaded_bit_for_bit(
    write: Callable[[nn.Module, Path], Path], tmp_path: Path
) -> None:
    model, source = Net(), trained()
    tensors = {name: id(x) for name, x in model.named_parameters()}
    report = load_weights(model, write(source, tmp_path))
    assert_holds(model, copied(source))
    assert report.loaded == tuple(model.state_dict())
    assert (report.missing, report.unexpected, report.cast, report.other_shape) == ((), (), (), ())
    assert report.tied == (("embedding.weight", "head.weight"),)
    # the very tensors that an optimizer may hold
    assert {name: id(x) for name, x in model.named_parameters()} == tensors
    assert str(report).startswith(f"loaded {len(report.loaded)} tensors from {tmp_path}")


def test_what_is_called_as_wrappers_are_is_told_apart(tmp_path: Path) -> None:
    """A part of the model's own called `module` is no wrapper of the others."""
    source, model = trained(), Net()
    state = {**copied(source), "weight": torch.zeros(4, 4)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatchError, match="nothing for 1: weight"):
        load_weights(model, tmp_path / "x.pt")
    state["weight"] = state.pop("module.weight")
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatchError, match=r"lacks 1 of the model's: module\.weight"):
        load_weights(model, tmp_path / "x.pt")


def test_conjugated_and_negated_tensors_of_a_dict() -> None:
    x = torch.rand(3, dtype=torch.complex64)
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    model.b = nn.Parameter(torch.zeros(3))
    model.tied = model.a
    load_weights(model, {"a": x.conj(), "b": x.conj().imag, "tied": x.conj().resolve_conj()})
    assert torch.equal(model.a, x.conj().resolve_conj())
    assert torch.equal(model.b, -x.imag)


def test_into_a_model_that_is_wrapped(tmp_path: Path) -> None:
    source = trained()
    model = Net()
    wrapped = torch.compile(model, backend="eager")
    load_weights(wrapped, as_pt(source, tmp_path))  # type: ignore[arg-type]
    assert_holds(model, copied(source))


def test_an_average_of_a_run_is_chosen_by_its_item(tmp_path: Path) -> None:
    model = trained()
    average = torch.optim.swa_utils.AveragedModel(Net())
    with actckpt.Checkpointer(tmp_path / "run", model=model, ema=average) as run:
        made = run.save()
    fresh = Net()
    report = load_weights(fresh, made, item="ema")
    assert_holds(fresh, copied(average.module))
    assert report.left_out == ("n_averaged",)
    with pytest.raises(CheckpointError, match="no item 'sma'; it has"):
        load_weights(fresh, made, item="sma")


# what does not fit


def test_another_head_is_left_alone_and_reported(tmp_path: Path) -> None:
    source, model = trained(), Net(out=3)
    head = model.head.weight.detach().clone()
    path = as_pt(source, tmp_path)
    before = copied(model)
    for strict in (True, "shapes"):
        with pytest.raises(CheckpointMismatchError, match=r"head.weight \[7, 4\], the model's is"):
            load_weights(model, path, strict=strict)
        assert_holds(model, before)
    report = load_weights(model, path, strict=False)
    assert report.other_shape == (("head.weight", "[7, 4]", "[3, 4]"),)
    assert same(model.head.weight, head)
    assert_holds(model, {**copied(source), "head.weight": head})
    assert "head.weight [7, 4], the model's is [3, 4]" in str(report)


def test_names_that_do_not_agree(tmp_path: Path) -> None:
    source, model = trained(), Net()
    state = copied(source)
    state["more.weight"] = state.pop("module.weight")
    torch.save(state, tmp_path / "other.pt")
    before = copied(model)
    with pytest.raises(CheckpointMismatchError) as raised:
        load_weights(model, tmp_path / "other.pt")
    assert "module.weight" in str(raised.value)
    assert "more.weight" in str(raised.value)
    assert_holds(model, before)
    report = load_weights(model, tmp_path / "other.pt", strict="shapes")
    assert (report.missing, report.unexpected) == (("module.weight",), ("more.weight",))
    assert_holds(model, {**copied(source), "module.weight": before["module.weight"]})
    report = load_weights(model, tmp_path / "other.pt", names={"more.": "module."})
    assert_holds(model, copied(source))


def test_no_name_that_agrees_is_an_error_however_lenient() -> None:
    with pytest.raises(CheckpointMismatchError, match="none of its 1 tensors fits"):
        load_weights(nn.Linear(2, 2, bias=False), {"other": torch.ones(2, 2)}, strict=False)


def test_other_shapes_of_all_are_an_error_however_lenient() -> None:
    with pytest.raises(CheckpointMismatchError, match=r"other shapes: weight \[1, 1\]"):
        load_weights(nn.Linear(2, 2, bias=False), {"weight": torch.ones(1, 1)}, strict=False)


def test_a_file_of_nothing_that_fits_is_an_error_however_lenient(tmp_path: Path) -> None:
    model = Net()
    before = copied(model)
    torch.save({"x": torch.ones(2), "embedding.weight": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatchError, match=r"other shapes: embedding\.weight"):
        load_weights(model, tmp_path / "x.pt", strict=False)
    assert_holds(model, before)


def test_a_prefix_is_named_and_can_be_taken_off_or_put_on(tmp_path: Path) -> None:
    source, model = trained(), Net()
    torch.save({f"encoder.{k}": v for k, v in source.state_dict().items()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatchError) as raised:
        load_weights(model, tmp_path / "x.pt")
    assert 'names={"encoder.": ""}' in str(raised.value)
    load_weights(model, tmp_path / "x.pt", names={"encoder.": ""})
    assert_holds(model, copied(source))
    outer = nn.ModuleDict({"encoder": Net()})
    with pytest.raises(CheckpointMismatchError) as raised:
        load_weights(outer, as_pt(source, tmp_path))
    assert 'names={"": "encoder."}' in str(raised.value)
    load_weights(outer, as_pt(source, tmp_path), names=lambda name: f"encoder.{name}")
    assert_holds(outer["encoder"], copied(source))


def test_transposed_layouts(tmp_path: Path) -> None:
    source, model = trained(), Net()
    state = copied(source)
    state["module.weight"] = state["module.weight"].T.contiguous()
    torch.save(state, tmp_path / "x.pt")
    report = load_weights(model, tmp_path / "x.pt", transposed=["module.*"])
    assert_holds(model, copied(source))
    assert report.transposed == ("module.weight",)
    wrapped = nn.Sequential()
    wrapped.add_module("_orig_mod", Net())
    load_weights(wrapped, tmp_path / "x.pt", transposed=["module.weight"])
    assert_holds(wrapped[0], copied(source))


@pytest.mark.parametrize("patterns", ["*.c_fc.weight", ["module.weight", "modul.weight"]])
def test_patterns_of_transposed_matrices_that_fit_none(patterns: Any, tmp_path: Path) -> None:
    model = Net()
    before = copied(model)
    with pytest.raises(ArgumentError, match="transposed"):
        load_weights(model, as_pt(trained(), tmp_path), transposed=patterns)
    assert_holds(model, before)


def test_casts_are_reported_and_those_that_lose_values_refused(tmp_path: Path) -> None:
    source, model = trained().float(), Net()
    report = load_weights(model, as_pt(source, tmp_path))
    assert report.cast == (
        ("narrow.weight", "float32", "bfloat16"),
        ("narrow.bias", "float32", "bfloat16"),
    )
    assert same(model.narrow.weight, source.narrow.weight.bfloat16())
    small = Net().half()
    before = copied(small)
    with torch.no_grad():
        source.module.weight[0, 0] = 1e6
    with pytest.raises(CheckpointMismatchError, match=r"module\.weight as float32"):
        load_weights(small, as_pt(source, tmp_path))
    assert_holds(small, before)
    state = copied(source)
    state["module.bias"] = torch.ones(4, dtype=torch.int64)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatchError, match="another kind of number"):
        load_weights(Net(), tmp_path / "x.pt")
