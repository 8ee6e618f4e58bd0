"""What the code sets otherwise than a checkpoint is noted; functions, which none holds, are too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import actckpt
from actckpt.resuming.functions import _constant
from actckpt.resuming.resumed import Resumed

PERIOD = 20
COUNT = {"steps": 0}


def run_of(
    directory: Path, make: Callable[[Any], dict[str, Any]], steps: int = 0
) -> Resumed | None:
    """A run that is resumed, makes some steps, and is saved."""
    model = nn.Linear(2, 2)
    made = make(model)
    run = actckpt.Checkpointer(directory, model=model, **made, loader=range(99), every=None)
    with run:
        resumed = run.resume()
        for _ in run.steps(total_steps=run.step_count + steps):
            made["optimizer"].step()
            if "scheduler" in made:
                made["scheduler"].step()
            run.step()
        run.save()
    return resumed


def between(
    directory: Path, saved: Callable[[Any], dict[str, Any]], here: Callable[[Any], dict[str, Any]]
) -> Resumed:
    run_of(directory, saved, steps=3)
    resumed = run_of(directory, here)
    assert resumed is not None
    return resumed


def adam(**how: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda model: {"optimizer": torch.optim.AdamW(model.parameters(), **how)}


def scheduled(make: Callable[[Any], Any], lr: float = 0.01) -> Callable[[Any], dict[str, Any]]:
    def made(model: nn.Module) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr)
        return {"optimizer": optimizer, "scheduler": make(optimizer)}

    return made


def averaged(decay: float) -> Callable[[Any], dict[str, Any]]:
    return lambda model: {
        **adam()(model),
        "ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)),
    }


@pytest.mark.kind("a setting that the code changed and the checkpoint puts back", resumed="exact")
@pytest.mark.parametrize(
    ("saved", "here", "notes"),
    [
        (adam(lr=0.1), adam(lr=0.1), []),
        (adam(lr=0.1), adam(lr=0.3), ["optimizer lr was 0.1 and stays so; the code sets 0.3"]),
        (
            adam(weight_decay=0.1),
            adam(weight_decay=0.2),
            ["optimizer weight_decay was 0.1 and stays so; the code sets 0.2"],
        ),
        (
            adam(betas=(0.9, 0.99)),
            adam(betas=(0.8, 0.99)),
            ["optimizer betas was (0.9, 0.99) and stays so; the code sets (0.8, 0.99)"],
        ),
        (adam(lr=torch.tensor(0.5)), adam(lr=torch.tensor(0.5)), []),
        (
            scheduled(lambda o: schedules.OneCycleLR(o, 0.02, total_steps=20)),
            scheduled(lambda o: schedules.OneCycleLR(o, 0.02, total_steps=40)),
            ["scheduler total_steps was 20 and stays so; the code sets 40"],
        ),
        (
            scheduled(lambda o: schedules.OneCycleLR(o, 0.02, total_steps=20)),
            scheduled(lambda o: schedules.OneCycleLR(o, 0.04, total_steps=20)),
            [
                "optimizer initial_lr was 0.0008 and stays so; the code sets 0.0016",
                "optimizer max_lr was 0.02 and stays so; the code sets 0.04",
                "optimizer min_lr was 8e-08 and stays so; the code sets 1.6e-07",
                "scheduler base_lrs was (0.0008) and stays so; the code sets (0.0016)",
            ],
        ),
        (
            scheduled(lambda o: schedules.CosineAnnealingLR(o, 20)),
            scheduled(lambda o: schedules.CosineAnnealingLR(o, 40)),
            ["scheduler T_max was 20 and stays so; the code sets 40"],
        ),
        (
            scheduled(lambda o: schedules.CosineAnnealingLR(o, 20)),
            scheduled(lambda o: schedules.CosineAnnealingLR(o, 20), lr=0.02),
            [
                "optimizer initial_lr was 0.01 and stays so; the code sets 0.02",
                "scheduler base_lrs was (0.01) and stays so; the code sets (0.02)",
            ],
        ),
        (
            scheduled(lambda o: schedules.MultiStepLR(o, [2, 9])),
            scheduled(lambda o: schedules.MultiStepLR(o, [2, 19])),
            ["scheduler milestones was {2: 1, 9: 1} and stays so; the code sets {19: 1, 2: 1}"],
        ),
        (
            scheduled(
                lambda o: schedules.SequentialLR(
                    o, [schedules.LinearLR(o, 0.1), schedules.ExponentialLR(o, 0.9)], [2]
                )
            ),
            scheduled(
                lambda o: schedules.SequentialLR(
                    o, [schedules.LinearLR(o, 0.1), schedules.ExponentialLR(o, 0.8)], [2]
                )
            ),
            ["scheduler[1] gamma was 0.9 and stays so; the code sets 0.8"],
        ),
        (
            scheduled(lambda o: schedules.ReduceLROnPlateau(o, patience=2)),
            scheduled(lambda o: schedules.ReduceLROnPlateau(o, patience=3)),
            ["scheduler patience was 2 and stays so; the code sets 3"],
        ),
    ],
)
def test_what_is_put_back_over_the_codes_is_noted(
    saved: Any, here: Any, notes: list[str], tmp_path: Path
) -> None:
    if "patience" in str(notes):
        run_of(tmp_path, saved)
        resumed = run_of(tmp_path, here)
        assert resumed is not None
    else:
        resumed = between(tmp_path, saved, here)
    assert [*resumed.notes] == notes
    assert resumed.bit_exact


def test_groups_are_told_apart(tmp_path: Path) -> None:
    def made(decay: float) -> Callable[[Any], dict[str, Any]]:
        return lambda model: {
            "optimizer": torch.optim.SGD(
                [
                    {"params": [model.weight], "weight_decay": decay},
                    {"params": [model.bias], "weight_decay": 0.0},
                ],
                lr=0.1,
            )
        }

    resumed = between(tmp_path, made(0.1), made(0.2))
    assert resumed.notes == (
        "optimizer weight_decay of group 0 was 0.1 and stays so; the code sets 0.2",
    )


def closed_over(period: int) -> Any:
    return lambda n: 1 - n / period


def counting() -> Any:
    seen = {"calls": 0}

    def factor(n: int) -> float:
        seen["calls"] += 1
        return 1 / seen["calls"]

    return factor


def nonlocal_counting() -> Any:
    calls = 0

    def factor(n: int) -> float:
        nonlocal calls
        calls += 1
        return 1 / calls

    return factor


def by_global(n: int) -> float:
    return 1 - n / PERIOD


def by_global_state(n: int) -> float:
    return 1 / (1 + COUNT["steps"])


def halved(n: int, period: int) -> float:
    return float(0.5 ** (n / period))


class Warmup:
    """Called, it counts; torch saves what it holds."""

    def __init__(self, period: int) -> None:
        self.period = period
        self.calls = 0

    def __call__(self, n: int) -> float:
        self.calls += 1
        return self.factor(n)

    def factor(self, n: int) -> float:
        return min(1.0, (n + 1) / self.period)


def by_lambda(factor: Any) -> Callable[[Any], dict[str, Any]]:
    return scheduled(lambda o: schedules.LambdaLR(o, factor))


@pytest.mark.kind("a schedule's function that is another, or keeps state", resumed="said no")
@pytest.mark.parametrize(
    ("saved", "here", "reason"),
    [
        (lambda n: 1 - n / 20, lambda n: 1 - n / 40, "another than it was"),
        (closed_over(20), closed_over(40), "its period was 20, is 40"),
        (counting(), counting(), r"its seen was {'calls': \d}, is {'calls': 1}"),
        (nonlocal_counting(), nonlocal_counting(), r"its calls was \d, is 1"),
        (functools.partial(halved, period=20), functools.partial(halved, period=40),
         "its period was 20, is 40"),
        (functools.partial(halved, period=20), functools.partial(closed_over(20)),
         "its period was 20, is not there|its period was 20, is 20|another than it was"),
        (Warmup(20).factor, Warmup(40).factor, "its self.period was 20, is 40"),
        (Warmup(20), lambda n: 1 - n / 20, "another than it was"),
    ],
    ids=["code", "closure", "state", "nonlocal", "partial", "partial of another", "method",
         "object"],
)  # fmt: skip
def test_a_function_that_is_another_is_named(
    saved: Any, here: Any, reason: str, tmp_path: Path
) -> None:
    resumed = between(tmp_path, by_lambda(saved), by_lambda(here))
    with pytest.raises(AssertionError, match=rf"scheduler\.lr_lambdas\[0\] is .*{reason}"):
        raise AssertionError(resumed.inexact)
    assert len(resumed.inexact) == 1


@pytest.mark.parametrize(
    "factor",
    [lambda: closed_over(20), lambda: functools.partial(halved, period=20), lambda: Warmup(20),
     lambda: Warmup(20).factor, lambda: by_global],
    ids=["closure", "partial", "object", "method", "global"],
)  # fmt: skip
def test_the_same_function_is_the_same(factor: Any, tmp_path: Path) -> None:
    resumed = between(tmp_path, by_lambda(factor()), by_lambda(factor()))
    assert resumed.bit_exact, resumed
    assert resumed.notes == ()


def test_a_global_that_it_names_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(tmp_path / "a", by_lambda(by_global), steps=2)
    monkeypatch.setitem(globals(), "PERIOD", 30)
    resumed = run_of(tmp_path / "a", by_lambda(by_global))
    assert resumed is not None
    assert "its PERIOD was 20, is 30" in resumed.inexact[0]
    monkeypatch.setitem(COUNT, "steps", 3)
    run_of(tmp_path / "b", by_lambda(by_global_state), steps=2)
    monkeypatch.setitem(COUNT, "steps", 0)
    resumed = run_of(tmp_path / "b", by_lambda(by_global_state))
    assert resumed is not None
    assert "its COUNT was {'steps': 3}, is {'steps': 0}" in resumed.inexact[0]


@pytest.mark.kind("an average of another decay", resumed="said no")
def test_an_average_of_another_decay(tmp_path: Path) -> None:
    assert between(tmp_path / "same", averaged(0.9), averaged(0.9)).bit_exact
    (reason,) = between(tmp_path / "other", averaged(0.9), averaged(0.5)).inexact
    assert reason.startswith(
        "ema.multi_avg_fn is a function, which no checkpoint holds: its func.decay"
    )


def test_sets_among_the_constants_have_no_order() -> None:
    many = [f"word {n}" for n in range(20)]  # in every process they are hashed otherwise
    assert _constant(frozenset(many)) == repr(sorted(map(repr, many)))
