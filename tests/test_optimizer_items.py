"""A run of several optimizers, killed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import actckpt
from actckpt.errors import CheckpointMismatchError
from tests.loop_peaks import other_bits, weights
from tests.models.blocks import Chain, Residual, rows

pytestmark = pytest.mark.usefixtures("flat_profile")
Optimizers = list[torch.optim.Optimizer]


def made() -> tuple[nn.Module, Optimizers]:
    torch.manual_seed(0)
    m = Chain(Residual(), Residual())
    matrices = [p for p in m.parameters() if p.ndim == 2]
    others = [p for p in m.parameters() if p.ndim != 2]
    return m, [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, 1e-2)]


def step(m: nn.Module, optimizers: Optimizers, seed: int) -> None:
    m(rows(5 + seed)).square().mean().backward()
    for o in optimizers:
        o.step()
        o.zero_grad()


@pytest.mark.kind("several optimizers of one run", bits=True, resumed="exact")
def test_a_run_of_several_optimizers_is_resumed(tmp_path: Path) -> None:
    m, optimizers = made()
    for seed in range(5):
        step(m, optimizers, seed)
    expected = weights([m])

    m, optimizers = made()
    actckpt.optimize(m, 1.0)
    with actckpt.Checkpointer(tmp_path, model=m, optimizer=optimizers, every=None) as run:
        for seed in range(3):
            step(m, optimizers, seed)
        run.save()
        names = {path.stem for path in tmp_path.glob("step-*/optimizer*.safetensors")}
        assert names == {"optimizer", "optimizer-1"}

    m, optimizers = made()
    actckpt.optimize(m, 1.0)
    with actckpt.Checkpointer(tmp_path, model=m, optimizer=optimizers, every=None) as run:
        run.resume()
        for seed in range(3, 5):
            step(m, optimizers, seed)
    assert not other_bits(expected, weights([m]))

    m, optimizers = made()
    with actckpt.Checkpointer(tmp_path, model=m, optimizer=optimizers, every=None) as run:
        run.restore(only=["model", "optimizer"])
        for seed in range(3, 5):
            step(m, optimizers, seed)
    assert not other_bits(expected, weights([m]))


def test_optimizers_in_another_order_are_refused(tmp_path: Path) -> None:
    m, optimizers = made()
    with actckpt.Checkpointer(tmp_path, model=m, optimizer=optimizers, every=None) as run:
        step(m, optimizers, 0)
        run.save()
    m, optimizers = made()
    with (
        actckpt.Checkpointer(tmp_path, model=m, optimizer=optimizers[::-1], every=None) as run,
        pytest.raises(CheckpointMismatchError, match="holds the optimizer of a Muon"),
    ):
        run.resume()
    with (
        actckpt.Checkpointer(tmp_path, model=m, optimizer=optimizers[0], every=None) as run,
        pytest.raises(CheckpointMismatchError, match="holds optimizer-1"),
    ):
        run.resume()
