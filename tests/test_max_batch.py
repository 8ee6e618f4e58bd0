"""The largest batch is the largest: it trains within the budget, and one more is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.budget_error import BudgetError
from actckpt.planning.batch_search import BatchTried, search


def chain() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)))


def residual() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def convolutions() -> nn.Module:
    def block(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    return nn.Sequential(block(3), block(8), block(8))


CASES = [
    pytest.param(chain, (64,), 4_000_000, "auto", id="chain"),
    pytest.param(residual, (16, 32), 2_000_000, "calls", id="transformer"),
    pytest.param(convolutions, (3, 16, 16), 4_000_000, "calls", id="convolutions"),
]


def loss_fn(out: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


@pytest.mark.parametrize(("make", "shape", "budget_bytes", "policy"), CASES)
def test_the_largest_trains_and_one_more_does_not_fit(
    make: object, shape: tuple[int, ...], budget_bytes: int, policy: str
) -> None:
    assert callable(make)
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gb = budget_bytes / 1e9

    def batch(size: int) -> torch.Tensor:
        return torch.randn(size, *shape)

    asked: dict[str, Any] = {"loss_fn": loss_fn, "policy": policy}
    found = actckpt.find_max_batch(model, gb, batch, **asked)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found.largest > 1
    assert found.fastest in {t.batch_size for t in found.tried if t.fits}
    assert max(t.samples_per_s for t in found.tried) == next(
        t.samples_per_s for t in found.tried if t.batch_size == found.fastest
    )
    assert f"{found.largest:5d}" in str(found)
    assert "largest" in str(found)
    actckpt.optimize(model, gb, batch=batch(found.largest), **asked)
    measured = actckpt.measure(model, batch(found.largest), loss_fn=loss_fn)
    assert 0.9 * budget_bytes < measured.peak_bytes <= budget_bytes
    with pytest.raises(BudgetError):
        actckpt.optimize(model, gb, batch=batch(found.largest + 1), **asked)


def test_an_optimized_model_keeps_its_plan() -> None:
    model = chain()
    batch = torch.randn(512, 64)
    actckpt.optimize(model, None, batch=batch, loss_fn=loss_fn, policy="full")
    plan = actckpt.report(model).plan
    actckpt.find_max_batch(model, 0.002, lambda n: torch.randn(n, 64), loss_fn=loss_fn, limit=64)
    assert actckpt.report(model).plan == plan


def test_a_limit_is_kept_and_a_first_batch_too_large_is_an_error() -> None:
    found = actckpt.find_max_batch(
        chain(), 1.0, lambda n: torch.randn(n, 64), loss_fn=loss_fn, limit=5
    )
    assert found.largest == 5
    with pytest.raises(BudgetError, match="below"):
        actckpt.find_max_batch(chain(), 1e-5, lambda n: torch.randn(n, 64), loss_fn=loss_fn)
    with pytest.raises(BudgetError, match="budget"):
        actckpt.find_max_batch(chain(), None, lambda n: torch.randn(n, 64), policy="full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start and limit"):
        actckpt.find_max_batch(chain(), 1.0, lambda n: torch.randn(n, 64), start=9, limit=5)


@pytest.mark.parametrize("largest", [1, 2, 3, 7, 8, 100, 1023])
@pytest.mark.parametrize("start", [1, 3, 16])
def test_search_finds_every_size(largest: int, start: int) -> None:
    asked = []

    def attempt(size: int) -> BatchTried:
        asked.append(size)
        return BatchTried(size, size <= largest, 1, 1.0 if size <= largest else None)

    if start > largest:
        return
    found = search(attempt, start, 1 << 20)
    assert found.largest == largest
    assert len(asked) == len(set(asked)) <= 24
    assert [t.batch_size for t in found.tried] == sorted(asked)
