"""How far below the budget plans aim, and what a GPU adds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import actckpt
from actckpt.planning import margin
from actckpt.rewriting.holders import bits, is_seed
from tests.exact import differences, outcome, scalar_loss
from tests.models.blocks import chain, rows
from tests.suite import seeded


class _OnGpu(nn.Module):
    """Stands for a model whose parameters are on a GPU."""

    def parameters(self, recurse: bool = True) -> object:  # type: ignore[override]
        class Parameter:
            is_cuda = True

        return iter([Parameter()])


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_blocks_are_counted_whole_without_expandable_segments(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert margin.aims(nn.Linear(2, 2)) == (margin.AIM, margin.UNTOUCHED_AIM)
    assert margin.aims(_OnGpu()) == (margin.BLOCKS_AIM, margin.BLOCKS_AIM)
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    assert margin.aims(_OnGpu()) == (margin.AIM, margin.UNTOUCHED_AIM)


@pytest.mark.parametrize("share", [0.97, 0.99])
def test_a_plan_aims_where_the_model_is(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actckpt.planning.search.aims", lambda model: (share, share))
    model, x = seeded(chain(6))(), rows(512)
    peak = actckpt.measure(model, x, loss_fn=scalar_loss, steps=1).added_bytes
    actckpt.optimize(model, 0.8 * peak / 1e9, batch=x, loss_fn=scalar_loss, scope="activations")
    added_bytes = actckpt.report(model).planned.predicted.added_bytes
    assert added_bytes is not None
    assert added_bytes <= share * 0.8 * peak
    assert not differences(outcome(seeded(chain(6))(), x), outcome(model, x))


def test_only_what_may_be_a_seed_goes_unread() -> None:
    assert is_seed(torch.int64, 1)
    assert is_seed(torch.uint64, 2)
    assert not is_seed(torch.int64, 3)
    assert not is_seed(torch.float32, 1)
    assert bits(torch.tensor(7)) is not None  # on the CPU it is an index
