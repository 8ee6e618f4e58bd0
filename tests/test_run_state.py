"""What is saved comes back, whatever the objects are; what cannot is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from tests.small_run import Small, advance, names, objects, state
from tests.test_checkpoint_encoding import same


def test_gradients_in_the_middle_of_accumulation(tmp_path: Path) -> None:
    made, again = objects(), objects(seed=1)
    loader = [torch.randn(5, 2) for _ in range(4)]
    found = []
    for each in (made, again):
        with actckpt.Checkpointer(tmp_path, **each, loader=loader) as run:
            run.resume()
            for step, batch in run.steps():
                each["model"](batch).backward()
                if step == 0 and run.list() == []:
                    run.save()
                if run._progress.position.batch % 2 == 0:
                    each["optimizer"].step()
                    each["optimizer"].zero_grad()
                    run.step()
            assert run.step_count == 2
        found.append(state(each))
    assert same(found[0], found[1])


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3, 3]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2),
                torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
            ],
            [2],
        ),
    ],
    ids=["multistep", "onecycle", "restarts", "plateau", "lambda", "cyclic", "sequential"],
)
def test_every_scheduler(schedule: Any, tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        made = objects(seed=seed)
        made["scheduler"] = schedule(made["optimizer"])
        with actckpt.Checkpointer(tmp_path, **made) as run:
            run.resume()
            for _ in range(4 if seed else 2):
                _scheduled_step(run, made)
            if not seed:
                run.save()
                for _ in range(4):
                    _scheduled_step(run, made)
        found.append((state(made), made["optimizer"].param_groups[0]["lr"]))
    assert same(found[0], found[1])


def _scheduled_step(run: actckpt.Checkpointer, made: dict[str, Any]) -> None:
    advance(run, made, 1)
    plateau = isinstance(made["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau)
    made["scheduler"].step(*([1.0] if plateau else []))


@pytest.mark.parametrize(
    "optimize",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), amsgrad=True),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.RMSprop(p, centered=True),
        lambda p: torch.optim.LBFGS(p),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.Rprop(p),
    ],
    ids=["sgd", "momentum", "adam", "adafactor", "rmsprop", "lbfgs", "nadam", "rprop"],
)
def test_every_optimizer(optimize: Any, tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Small()
        made = {"model": model, "optimizer": optimize(model.parameters())}
        with actckpt.Checkpointer(tmp_path, **made) as run:
            run.resume()
            for count in range(2 if seed else 4):
                x = torch.randn(5, 2)

                def closure(x: torch.Tensor = x, made: Any = made) -> torch.Tensor:
                    made["optimizer"].zero_grad()
                    loss: torch.Tensor = made["model"](x)
                    loss.backward()
                    return loss

                made["optimizer"].step(closure)
                run.step()
                if not seed and count == 1:
                    run.save()
        found.append(state(made))
    assert same(found[0], found[1])


def test_moments_of_another_dtype_than_the_parameter_are_not_rounded(tmp_path: Path) -> None:
    model = nn.Linear(3, 3, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.randn(p.shape),
            "exp_avg_sq": torch.rand(p.shape),
        }
    with actckpt.Checkpointer(tmp_path, model=model, optimizer=optimizer) as run:
        run.save()
        again = torch.optim.AdamW(model.parameters())
    with actckpt.Checkpointer(tmp_path, model=model, optimizer=again) as run:
        run.resume()
    assert same(again.state_dict(), optimizer.state_dict())


def test_a_state_that_cannot_be_saved_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    class Odd:
        def __init__(self) -> None:
            self.value: Any = 1

        def state_dict(self) -> dict[str, Any]:
            return {"inner": [self.value]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["inner"][0]

    made, odd = objects(), Odd()
    with actckpt.Checkpointer(tmp_path, **made, extra={"odd": odd}, every=None) as run:
        run.save()
        odd.value = object()
        advance(run, made, 1)
        with pytest.raises(actckpt.CheckpointSaveError, match=r"extra-odd\['inner'\]\[0\]"):
            run.save()
        assert names(run) == ["step-00000000"]
        assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000000"]


@pytest.mark.parametrize("failing", ["scheduler", "extra"])
def test_an_object_that_fails_to_load_leaves_all_as_they_were(failing: str, tmp_path: Path) -> None:
    class Failing:
        value = 0
        fails = False

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]
            if self.fails and self.value == 1:
                raise RuntimeError("cannot")

    bad = Failing()
    more: dict[str, Any] = {"extra": {"x": bad}} if failing == "extra" else {"scheduler": bad}
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, **more, every=None) as run:
        advance(run, made, 1)
        bad.value = 1
        run.save()
        advance(run, made, 2)
        bad.value, bad.fails = 2, True
        before, random = state(made), torch.get_rng_state()
        with pytest.raises(RuntimeError, match="cannot"):
            run.restore()
        assert same(state(made), before)
        assert bad.value == 2
        assert torch.equal(torch.get_rng_state(), random)
        assert run.step_count == 3
