"""`load_weights`: from every kind of file, all that was asked for or nothing, bit for bit."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import actckpt
from actckpt import (
    ArgumentError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    load_weights,
)


class Net(nn.Module):
    """A tied matrix, another dtype, statistics, and an own name that looks like a wrapper's."""

    def __init__(self, out: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.module = nn.Linear(4, 4)
        self.narrow = nn.Linear(4, 4).bfloat16()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, out, bias=False)
        if out == 7:
            self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        y: torch.Tensor = self.head(self.norm(self.module(self.embedding(x))))
        return y


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Dtype, shape and every bit."""
    flat = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is in it now."""
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_holds(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in found if not same(found[name], wanted[name])] == []


def trained(out: int = 7) -> Net:
    """With values that no new one has."""
    torch.manual_seed(1)
    model = Net(out)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x))
        model.norm.running_mean.uniform_()  # type: ignore[union-attr]
        model.norm.num_batches_tracked.add_(3)  # type: ignore[union-attr]
    return model


# sources: each writes the weights of a model into a folder, and says what to load


def as_safetensors(model: nn.Module, folder: Path) -> Path:
    save_file(copied(model), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def as_folder_of_it(model: nn.Module, folder: Path) -> Path:
    save_file(copied(model), folder / "model.safetensors")
    return folder


def as_shards(model: nn.Module, folder: Path, ending: str = "safetensors") -> Path:
    state = copied(model)
    table = {name: f"part-{n % 2}.{ending}" for n, name in enumerate(state)}
    for file in set(table.values()):
        part = {name: x for name, x in state.items() if table[name] == file}
        if ending == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    name = "model.safetensors" if ending == "safetensors" else "pytorch_model.bin"
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def as_bin_shards(model: nn.Module, folder: Path) -> Path:
    return as_shards(model, folder, "bin")


def as_bin(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def as_pt(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def as_old_pt(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


def as_checkpoint_of_a_loop(model: nn.Module, folder: Path) -> Path:
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    state = {"epoch": 3, "model_state_dict": model.state_dict(), "optimizer": optimizer}
    torch.save(state, folder / "loop.pt")
    return folder / "loop.pt"


def as_run(model: nn.Module, folder: Path) -> Path:
    with actckpt.Checkpointer(folder / "run", model=model) as run:
        run.save()
    return folder / "run"


def as_step_of_a_run(model: nn.Module, folder: Path) -> Path:
    return next(as_run(model, folder).glob("step-*"))


def as_wrapped(model: nn.Module, folder: Path) -> Path:
    """As of a compiled model in DistributedDataParallel."""
    state = {f"module._orig_mod.{name}": x for name, x in copied(model).items()}
    torch.save(state, folder / "wrapped.pt")
    return folder / "wrapped.pt"


def as_checkpoint_beside_a_random_state(model: nn.Module, folder: Path) -> Path:
    state = {"rng": torch.get_rng_state(), "model": model.state_dict(), "ema": {"a": torch.ones(1)}}
    torch.save(state, folder / "random.pt")
    return folder / "random.pt"


def as_average(model: nn.Module, folder: Path) -> Path:
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    torch.save(average.state_dict(), folder / "average.pt")
    return folder / "average.pt"


def as_export(model: nn.Module, folder: Path, format: str = "safetensors") -> Path:
    actckpt.export(model, folder / "out", format=format)
    return folder / "out"


def as_export_pt(model: nn.Module, folder: Path) -> Path:
    return as_export(model, folder, "pt")


def as_export_hf(model: nn.Module, folder: Path) -> Path:
    return as_export(model, folder, "huggingface")


SOURCES = [
    as_safetensors, as_folder_of_it, as_shards, as_bin_shards, as_bin, as_pt, as_old_pt,
    as_checkpoint_of_a_loop, as_run, as_step_of_a_run, as_wrapped, as_average,
    as_checkpoint_beside_a_random_state,
    as_export, as_export_pt, as_export_hf,
]  # fmt: skip


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


# ties


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


# damaged, foreign, hostile, empty


class Bomb:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("bomb",)


def write_index(path: Path, table: object) -> Path:
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps(table))
    return index


def short(path: Path, count: int = 1) -> Path:
    path.write_bytes(path.read_bytes()[:-count])
    return path


def turned(path: Path, value: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[content.index(value)] ^= 1
    path.write_bytes(content)
    return path


def old_and_new(folder: Path) -> Path:
    as_folder_of_it(trained(), folder)
    return as_shards(trained(), folder)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def saved(path: Path, state: object, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


def cycle() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["model"] = found
    return found


def piped(path: Path) -> Path:
    os.mkfifo(path)
    return path


BAD: dict[str, tuple[Callable[[Path], Path], type[Exception], str]] = {
    "nothing": (lambda d: d / "none.pt", CheckpointError, "does not exist"),
    "empty file": (lambda d: written(d / "x.pt", b""), CheckpointFormatError, "is empty"),
    "empty folder": (lambda d: d, CheckpointError, "it has nothing"),
    "text": (lambda d: written(d / "x.pt", b"hello" * 9), CheckpointFormatError, "no safetensors"),
    "url": (lambda d: Path("s3://bucket/x"), ArgumentError, "is a URL"),
    "short safetensors": (
        lambda d: short(as_safetensors(trained(), d)), CheckpointFormatError, "bytes of data"),
    "short pt": (lambda d: short(as_pt(trained(), d)), CheckpointFormatError, "damaged"),
    "short old pt": (
        lambda d: short(as_old_pt(trained(), d), 99), CheckpointFormatError, "damaged"),
    "turned bit in pt": (
        lambda d: turned(
            as_pt(trained(), d), trained().module.weight.detach().numpy().tobytes()
        ), CheckpointFormatError, "not what was written"),
    "hostile pt": (lambda d: saved(d / "x.pt", Bomb()), CheckpointFormatError, "posix.mkdir"),
    "hostile old pt": (
        lambda d: saved(d / "x.pt", Bomb(), _use_new_zipfile_serialization=False),
        CheckpointFormatError, "posix.mkdir"),
    "hostile pickle": (
        lambda d: written(d / "x.pkl", pickle.dumps(Bomb())), CheckpointFormatError, "x.pkl"),
    "no file": (lambda d: piped(d / "x.pt"), CheckpointError, "neither a file nor a folder"),
    "hostile bin": (
        lambda d: saved(d / "pytorch_model.bin", {"a": Bomb()}).parent,
        CheckpointFormatError, "posix.mkdir"),
    "whole model": (
        lambda d: saved(d / "x.pt", trained()), CheckpointFormatError,
        "tests.test_load_weights.Net"),
    "no tensors": (lambda d: saved(d / "x.pt", {"a": 1}), CheckpointError, "item="),
    "a cycle": (lambda d: saved(d / "x.pt", cycle()), CheckpointFormatError, "without end"),
    "a list": (lambda d: saved(d / "x.pt", [torch.ones(2)]), CheckpointFormatError, "by name"),
    "sparse": (
        lambda d: saved(d / "x.pt", {"embedding.weight": torch.eye(7)[:, :4].to_sparse()}),
        CheckpointFormatError, "dense"),
    "gguf": (lambda d: written(d / "x.gguf", b"GGUF" + b"\0" * 20), CheckpointFormatError, "GGUF"),
    "index of nothing": (
        lambda d: write_index(d, {"weight_map": {"a": "b.safetensors"}}),
        CheckpointFormatError, "not there"),
    "index outside": (
        lambda d: write_index(d, {"weight_map": {"a": "../b.safetensors"}}),
        CheckpointFormatError, "no file beside it"),
    "index of others": (
        lambda d: write_index(
            as_safetensors(trained(), d).parent, {"weight_map": {"a": "weights.safetensors"}}
        ), CheckpointFormatError, "where it is not"),
    "old and new": (old_and_new, CheckpointFormatError, "which are newer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_and_the_model_untouched(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, kind, told = BAD[case]
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    model = Net()
    before = copied(model)
    versions = {name: x._version for name, x in model.state_dict(keep_vars=True).items()}
    with pytest.raises(kind) as raised:
        load_weights(model, path, strict=False)
    assert told in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 10
    assert_holds(model, before)
    # not even written and put back
    assert {n: x._version for n, x in model.state_dict(keep_vars=True).items()} == versions
    assert not (tmp_path / "bomb").exists()


def test_an_error_in_the_middle_puts_back_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = Net(), as_pt(trained(), tmp_path)
    before = copied(model)
    copy_ = torch.Tensor.copy_

    def fails_late(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if self is model.norm.weight and not same(args[0], before["norm.weight"]):
            raise KeyboardInterrupt
        return copy_(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", fails_late)
    with pytest.raises(KeyboardInterrupt):
        load_weights(model, path)
    monkeypatch.undo()
    assert_holds(model, before)


def test_a_tensor_whose_elements_are_one_number_is_refused() -> None:
    """Nothing can be copied into it, and nothing put back."""
    model = trained()
    model.register_buffer("zz", torch.ones(1).expand(4))
    before = copied(model)
    state = {name: x + 1 for name, x in before.items()}
    with pytest.raises(ArgumentError, match="zz of the model has elements that are one"):
        load_weights(model, state)
    assert_holds(model, before)


def test_one_tensor_that_cannot_be_put_back_keeps_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = Net(), as_pt(trained(), tmp_path)
    before = copied(model)
    copy_ = torch.Tensor.copy_

    def fails(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if self is model.norm.weight:
            raise RuntimeError("not into this one")
        return copy_(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", fails)
    with pytest.raises(CheckpointMismatchError, match=r"put back as they were into norm\.weight"):
        load_weights(model, path)
    monkeypatch.undo()
    assert_holds(model, before)


def test_an_item_of_what_has_no_parts(tmp_path: Path) -> None:
    for path in (as_safetensors(trained(), tmp_path), as_shards(trained(), tmp_path)):
        with pytest.raises(CheckpointError, match="has no parts"):
            load_weights(Net(), path, item="ema")
    with pytest.raises(CheckpointError, match="no part 'ema'; it has none"):
        load_weights(Net(), as_pt(trained(), tmp_path), item="ema")


def test_arguments_that_are_none(tmp_path: Path) -> None:
    model = Net()
    calls: list[Callable[[], object]] = [
        lambda: load_weights(model, 3),  # type: ignore[arg-type]
        lambda: load_weights(model, tmp_path, strict="all"),
        lambda: load_weights(model, tmp_path, strict=1),  # type: ignore[arg-type]
        lambda: load_weights(load_file, tmp_path),  # type: ignore[arg-type]
        lambda: load_weights(Net().to("meta"), as_pt(model, tmp_path)),
        lambda: load_weights(model, as_pt(model, tmp_path), names=lambda _: "one"),
    ]
    for call in calls:
        with pytest.raises(ArgumentError):
            call()
