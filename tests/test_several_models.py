"""A second model and its optimizer in ``extra=``: named, put back whole, refused where mixed up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import actckpt
from tests.test_checkpoint_encoding import same


class Layers(nn.Module):
    """Two layers of equal shape, and a statistic that is no part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.register_buffer("scale", torch.ones(3), persistent=False)
        self.scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale = self.scale * 0.9 + x.detach().abs().mean(0) * 0.1
        out: torch.Tensor = self.second(self.first(x)) * self.scale
        return out


class Temperature:
    """A parameter in no module, in something that has a state."""

    def __init__(self) -> None:
        self.value = nn.Parameter(torch.ones(3, 3))

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.value.copy_(state["value"])


def objects(seed: int, *, swapped: bool = False, lone: bool = False) -> dict[str, Any]:
    """A model and a critic, an optimizer each; in the critic's, some order of parameters."""
    torch.manual_seed(seed)
    model, critic, temperature = Layers(), Layers(), Temperature()
    order = [*critic.parameters()][:: -1 if swapped else 1]
    order += [temperature.value] + ([nn.Parameter(torch.ones(2))] if lone else [])
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), 0.1),
        "ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
        "extra": {
            "critic": critic,
            "critic-optimizer": torch.optim.AdamW(order, 0.1),
            "temperature": temperature,
        },
    }


def backward(made: dict[str, Any]) -> None:
    extra = made["extra"]
    out = extra["critic"](made["model"](torch.randn(4, 3))) * extra["temperature"].value[0, 0]
    out.square().mean().backward()


def step(made: dict[str, Any]) -> None:
    for optimizer in (made["optimizer"], made["extra"]["critic-optimizer"]):
        optimizer.step()
        optimizer.zero_grad()
    made["ema"].update_parameters(made["model"])


def everything(made: dict[str, Any]) -> Any:
    flat = {**made, **made["extra"]}
    del flat["extra"]
    buffers = [dict(x.named_buffers()) for x in flat.values() if isinstance(x, nn.Module)]
    return copy.deepcopy(([x.state_dict() for x in flat.values()], buffers))


@pytest.mark.kind("a second model in extra=", resumed="exact")
@pytest.mark.parametrize("amid", [False, True], ids=["after a step", "amid accumulation"])
def test_both_models_go_on_where_they_were(amid: bool, tmp_path: Path) -> None:
    made, again = objects(0), objects(1)
    loader = [torch.zeros(1)] * 20
    with actckpt.Checkpointer(tmp_path, **made, loader=loader, every=None) as run:
        for count, _ in enumerate(run.steps()):
            backward(made)
            if count % 2 == 1:
                step(made)
                run.step()
            if count == (2 if amid else 3):
                run.save()
                break
        assert (made["extra"]["critic"].first.weight.grad is not None) == amid
        for _ in range(1 if amid else 2):
            backward(made)
        step(made)
    with actckpt.Checkpointer(tmp_path, **again, loader=loader, every=None) as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.bit_exact, str(resumed)
        for _ in range(1 if amid else 2):
            backward(again)
        step(again)
    assert same(everything(again), everything(made))


@pytest.mark.kind("an average with buffers that are no state", resumed="exact")
def test_an_average_of_buffers_is_put_back(tmp_path: Path) -> None:
    made = objects(0)
    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        for _ in run.steps(range(3)):
            backward(made)
            step(made)
            run.step()
        run.save()
    again = objects(1)
    with actckpt.Checkpointer(tmp_path, **again, every=None) as run:
        resumed = run.resume()
    assert resumed is not None
    assert resumed.bit_exact
    average = made["ema"].module.scale
    assert not torch.equal(average, torch.ones(3))
    assert torch.equal(again["ema"].module.scale, average)
    assert torch.equal(again["extra"]["critic"].scale, made["extra"]["critic"].scale)


@pytest.mark.kind("parameters in another order, of a second model", resumed="said no")
def test_another_order_in_the_second_optimizer_is_refused(tmp_path: Path) -> None:
    with actckpt.Checkpointer(tmp_path, **objects(0), every=None) as run:
        run.save()
    again = objects(1, swapped=True)
    before = everything(again)
    with (
        actckpt.Checkpointer(tmp_path, **again, every=None) as run,
        pytest.raises(
            actckpt.CheckpointMismatchError,
            match=r"parameter 0 of group 0 of the extra-critic-optimizer is extra-critic:second\."
            r"weight, saved was extra-critic:first\.weight",
        ),
    ):
        run.resume()
    assert same(everything(again), before)


@pytest.mark.kind("a parameter in nothing that was passed", resumed="said no")
def test_a_parameter_that_nobody_saves_is_named(tmp_path: Path) -> None:
    for seed in range(2):
        with actckpt.Checkpointer(tmp_path, **objects(seed, lone=True), every=None) as run:
            resumed = run.resume()
            run.save()
    assert resumed is not None
    assert resumed.inexact == (
        "parameter 3 of group 0 of the extra-critic-optimizer is in nothing that was passed: its "
        "value is in no checkpoint",
    )


def test_saved_without_names_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as a version did that named those of the model alone, and kept no other buffers
    made = objects(0)
    monkeypatch.setattr(
        "actckpt.resuming.parameter_names.ParameterNames.of",
        lambda self, p: next((n for n, q in made["model"].named_parameters() if q is p), ""),
    )
    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        run.save()
    monkeypatch.undo()
    with actckpt.Checkpointer(tmp_path, **objects(1), every=None) as run:
        resumed = run.resume()
    assert resumed is not None
    (reason,) = resumed.inexact
    assert reason.startswith(
        "parameter 0 of group 0 of the extra-critic-optimizer (and 2 more) was saved without a name"
    )


@pytest.mark.parametrize("empty", [0, 1], ids=["first", "last"])
def test_empty_groups_stay(empty: int, tmp_path: Path) -> None:
    def made(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 3)
        groups: list[Any] = [{"params": [*model.parameters()], "weight_decay": 0.1}]
        groups.insert(empty, {"params": [], "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups)
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n)),
        }

    states = []
    for seed in range(2):
        run_of = made(seed)
        with actckpt.Checkpointer(tmp_path, **run_of, every=None) as run:
            resumed = run.resume()
            for _ in run.steps(range(2), total_steps=2 + 2 * seed):
                run_of["model"](torch.ones(1, 3)).sum().backward()
                run_of["optimizer"].step()
                run_of["scheduler"].step()
                run_of["optimizer"].zero_grad()
                run.step()
                if run.step_count == 2:
                    run.save()
            if not seed:
                for _ in range(2):
                    run_of["model"](torch.ones(1, 3)).sum().backward()
                    run_of["optimizer"].step()
                    run_of["scheduler"].step()
                    run_of["optimizer"].zero_grad()
        states.append([x.state_dict() for x in run_of.values()])
    assert resumed is not None
    assert resumed.bit_exact
    assert same(states[0], states[1])
