"""Plans of optimized modules inside the model, or passed beside it, are saved and used again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.session.session import session_of


def blocks(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    parts = [nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(3)]
    return nn.Sequential(*parts)


class Container(nn.Module):
    """A model with an optimized one inside, as trainers make them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = actckpt.optimize(blocks(seed), 1.0, policy="full")
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.inner(x))
        return out


def objects(seed: int, *, optimized: bool = True) -> dict[str, Any]:
    model, critic = Container(seed), blocks(seed + 1)
    if not optimized:
        actckpt.revert(model.inner)
    actckpt.optimize(critic, 1.0, policy="full")
    parameters = [*model.parameters(), *critic.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return {"model": model, "optimizer": optimizer, "extra": {"critic": critic}}


def train(run: actckpt.Checkpointer, made: dict[str, Any], until: int) -> None:
    for _ in run.steps(range(100), total_steps=until):
        x = torch.randn(4, 8)
        made["model"](x).square().mean().backward()
        made["extra"]["critic"](x).square().mean().backward()
        made["optimizer"].step()
        made["optimizer"].zero_grad()
        run.step()


@pytest.mark.usefixtures("flat_profile")
@pytest.mark.kind("plans inside a container, and of a second model", resumed="exact", bits=True)
def test_plans_inside_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, again = objects(0), objects(5)
    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        run.resume()
        train(run, made, 2)
        run.save()
        train(run, made, 4)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("planned anew")

    monkeypatch.setattr("actckpt.planning.making.build_profile", never)
    with actckpt.Checkpointer(tmp_path, **again, every=None) as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.bit_exact, resumed
        used = "the saved plan is used for the step that it was made for"
        assert resumed.plan == f"inner: {used}; extra-critic: {used}"
        train(run, again, 4)
    for module in (again["model"].inner, again["extra"]["critic"]):
        session = session_of(module)
        assert session is not None
        assert session.current is not None
    for here, there in zip(again["model"].parameters(), made["model"].parameters(), strict=True):
        assert torch.equal(here, there)


@pytest.mark.usefixtures("flat_profile")
def test_one_that_is_no_longer_optimized_is_told(tmp_path: Path) -> None:
    made = objects(0)
    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        train(run, made, 1)
        run.save()
    with actckpt.Checkpointer(tmp_path, **objects(1, optimized=False), every=None) as run:
        resumed = run.resume()
    assert resumed is not None
    assert "inner: a plan was saved; this module is not optimized" in resumed.plan
