"""`load_weights` of what is damaged, foreign, hostile or empty: one error, the model untouched."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actckpt import (
    ArgumentError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    load_weights,
)
from tests.weight_sources import (
    Net,
    as_folder_of_it,
    as_old_pt,
    as_pt,
    as_safetensors,
    as_shards,
    assert_holds,
    copied,
    same,
    trained,
)


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
        "tests.weight_sources.Net"),
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
