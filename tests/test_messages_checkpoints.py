"""What is said of runs that cannot be saved or resumed as they are asked to be."""

from __future__ import annotations

import argparse
import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import actckpt
from actckpt.cli import main
from actckpt.errors import ArgumentError, CheckpointMismatchError
from tests.messages import said

pytestmark = pytest.mark.filterwarnings("ignore:export_weights is deprecated:DeprecationWarning")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))


def made(folder: Path | str, model: nn.Module | None = None, **more: Any) -> actckpt.Checkpointer:
    return actckpt.Checkpointer(folder, model=net() if model is None else model, **more)


# metrics

NO_METRICS: dict[str, tuple[Any, list[str]]] = {
    "the loss": (torch.tensor(1.5), ["a tensor of shape []", "step() takes nothing"]),
    "a loss with its graph": (
        nn.Linear(2, 2)(torch.ones(2)), ["step({\"loss\": loss})", "a tensor of shape [2]"],
    ),
    "a number": (0.25, ["found float 0.25"]),
    "a list": ([0.25], ["found list [0.25]"]),
    "a vector by name": ({"loss": torch.ones(3)}, ["metric loss must be a number, or a tensor"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_METRICS)
def test_what_are_no_metrics(name: str, tmp_path: Path) -> None:
    given, parts = NO_METRICS[name]
    with made(tmp_path, every=1) as run:
        for call in (lambda: run.step(given), lambda: run.save(metrics=given)):
            said(ArgumentError, parts, call)
        assert run.step_count == 0
        assert run.list() == []
        run.step({"loss": torch.tensor(1.5)})  # as the message says
        run.step()
        assert run.step_count == 2


# settings


class Size(enum.Enum):
    LARGE = 1


@dataclass
class Settings:
    lr: float = 0.1


NO_CONFIG: dict[str, tuple[Any, list[str]]] = {
    "a namespace": (argparse.Namespace(lr=0.1), ["found Namespace", "Pass vars(config)"]),
    "a dataclass": (Settings(), ["found Settings", "Pass dataclasses.asdict(config)"]),
    "a list": ([("lr", 0.1)], ["found list", "Pass a dict"]),
    "a path": ({"out": Path("runs/a")}, ["config['out'] is a pathlib", "'runs/a'", "str(value)"]),
    "an enumeration": ({"size": Size.LARGE}, ["config['size'] is a ", "Size", "str(value)"]),
    "a function": ({"fn": {"of": [net]}}, ["config['fn']['of'][0] is a builtins.function"]),
    "a key": ({"a": {Path("x"): 1}}, ["config['a'] has a key of type", "Path"]),
}


@pytest.mark.parametrize("name", NO_CONFIG)
def test_what_is_no_config(name: str, tmp_path: Path) -> None:
    given, parts = NO_CONFIG[name]
    folder = tmp_path / "run"
    said(ArgumentError, parts, lambda: made(folder, config=given))
    assert not folder.exists()


def test_plain_config_is_saved(tmp_path: Path) -> None:
    with made(tmp_path, config=vars(argparse.Namespace(lr=0.1, betas=(0.9, 0.95)))) as run:
        run.save()


# objects


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"optimizer": torch.optim.SGD}, ["optimizer is the class SGD", "that the loop uses"]),
        ({"scheduler": torch.optim.lr_scheduler.StepLR}, ["scheduler is the class StepLR"]),
        ({"optimizer": "sgd"}, ["optimizer must have state_dict", "found str"]),
        ({"loader": 3}, ["loader must be a DataLoader", "found int"]),
        ({"every": "2 epochs"}, ["found '2 epochs'", 'every="epoch"', "run.save()"]),
        ({"keep_last": 0}, ["keep_last must be at least 1"]),
        ({"verify": "some"}, ["verify must be one of", "'some'"]),
    ],
)
def test_what_is_no_object_or_option(
    more: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    said(ArgumentError, parts, lambda: made(tmp_path / "run", **more))
    assert not (tmp_path / "run").exists()


# places


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_text("mine")
    said(ArgumentError, [f"{file} is a file", "a folder of its own"], lambda: made(file))
    inside = file / "run"
    said(ArgumentError, [f"{file} is a file, which {inside} would"], lambda: made(inside))
    assert file.read_text() == "mine"


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket/run", "hf://me/run", "az://c/r"])
def test_urls(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = [f"{url} is a URL", "folders of this machine", "a mounted share"]
    for given in (url, Path(url)):
        for call in (
            lambda given=given: made(given),
            lambda given=given: actckpt.export_weights(given, "weights.safetensors"),
        ):
            said(ArgumentError, parts, call)
    for command in ("show", "verify", "prune", "journal"):  # ls takes tiers
        assert main(["checkpoint", command, url]) == 2
        assert f"{url} is a URL" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with made("./" + url) as run:  # as the message says
        run.save()
    assert run.list()


def test_a_file_url_and_a_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said(ArgumentError, [f"file://{tmp_path}", f"pass the path, {tmp_path}. ("],
         lambda: made(f"file://{tmp_path}"))  # fmt: skip
    made("C:/run").close()


# names


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def inner(model: nn.Module) -> nn.Module:
    assert isinstance(model, nn.Sequential)
    model[2] = compiled(model[2])
    return model


def plain(model: nn.Module) -> nn.Module:
    return model


def renamed(component: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: nn.ModuleDict({component: model})


# (saved from, resumed into) -> what is said, and into what it can be resumed
Wrap = Callable[[nn.Module], nn.Module]
WRAPPED: dict[str, tuple[Wrap, Wrap, list[str], list[Wrap]]] = {
    "compiled, plain": (
        compiled, plain,
        ["saved hold _orig_mod. (_orig_mod.0.", "torch.compile. Pass it wrapped as it was then",
         'torch.nn.ModuleDict({"_orig_mod": model})'],
        [compiled, renamed("_orig_mod")],
    ),
    "parallel, plain": (
        parallel, plain,
        ["saved hold module. (module.0.", "DistributedDataParallel or DataParallel",
         'torch.nn.ModuleDict({"module": model})'],
        [parallel, renamed("module")],
    ),
    "plain, compiled": (
        plain, compiled,
        ["passed hold _orig_mod. (_orig_mod.0.", "Pass the model inside, model._orig_mod"],
        [lambda model: compiled(model)._orig_mod],  # type: ignore[list-item, return-value]
    ),
    "plain, parallel": (
        plain, parallel,
        ["passed hold module. (module.0.", "Pass the model inside, model.module"],
        [lambda model: parallel(model).module],  # type: ignore[list-item, return-value]
    ),
    "compiled, parallel": (
        compiled, parallel,
        ["saved hold _orig_mod.", "; names of the model that was passed hold module."],
        [compiled],
    ),
    "a part compiled": (
        inner, plain, ["saved hold _orig_mod. (2._orig_mod.", "wrapped as it was then."], [inner],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_names_of_wrapped_models(name: str, tmp_path: Path) -> None:
    saved, live, parts, works = WRAPPED[name]
    with made(tmp_path, saved(net())) as run:
        run.save()
    model = live(net())
    with made(tmp_path, model) as run:
        for call in (run.resume, lambda: run.restore(only=["model"])):
            text = said(CheckpointMismatchError, parts, call, model)
            assert "Nothing was changed" in text
            assert "is only in the checkpoint" not in text
    for wrap in works:
        with made(tmp_path, wrap(net())) as run:
            assert run.resume() is not None


def test_another_model_is_not_taken_for_a_wrapped_one(tmp_path: Path) -> None:
    with made(tmp_path, compiled(net())) as run:
        run.save()
    with made(tmp_path, nn.Sequential(nn.Linear(3, 3))) as run:
        said(CheckpointMismatchError, ["is only in the checkpoint", "Build the"], run.resume)


@pytest.mark.parametrize(("wrap", "prefix"), [(compiled, "_orig_mod."), (parallel, "module.")])
def test_exported_names_of_wrapped_models(
    wrap: Wrap, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with made(tmp_path / "run", wrap(net())) as run:
        run.save()
    with caplog.at_level(logging.WARNING, logger="actckpt"):
        path = actckpt.export_weights(tmp_path / "run", tmp_path / "weights.safetensors")
    (record,) = caplog.records
    assert f"every name begins with {prefix}" in record.getMessage()
    assert f'k.removeprefix("{prefix}")' in record.getMessage()
    net().load_state_dict({k.removeprefix(prefix): v for k, v in load_file(path).items()})


def test_exported_names_of_a_plain_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with made(tmp_path / "run") as run:
        run.save()
    actckpt.export_weights(tmp_path / "run", tmp_path / "weights.safetensors")
    assert not caplog.records
