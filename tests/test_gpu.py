"""On a CUDA device: steps under plans are bitwise the untouched ones, statistics included."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.policies import POLICIES
from tests.burst_plans import each_alone, everything
from tests.exact import MakePlan, assert_exact, dear, scalar_loss
from tests.suite import CASES, Case, loss_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"
# batch normalization and dropout, whose kernels are others than the CPU's, before the rest
MODELS = ("resnet", "unet", "densenet", "gpt2_dropout", "siamese", "gpt2", "vit", "t5", "bert")


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Kernels that make the same twice, where there are any: the untouched model must, too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _moved(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    if isinstance(x, dict):
        return {key: _moved(value) for key, value in x.items()}
    return tuple(map(_moved, x)) if isinstance(x, tuple) else x


def _body(case: Case, model: nn.Module, found: Any) -> Any:
    with torch.autocast(DEVICE, torch.bfloat16, enabled=case.autocast):
        output = model(*found.args, **found.kwargs)
        loss = loss_of(case, output)
    loss.backward()
    return output


def _blocks(graph: Graph) -> Plan:
    return POLICIES["full"](graph, dear(graph), None)


PLANS: dict[str, tuple[MakePlan, bool]] = {
    "regions": (_blocks, False),
    "pruned regions": (_blocks, True),
    "one burst": (everything, False),
    "a burst each": (each_alone, False),
}


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("wanted", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_exact(name: str, wanted: str) -> None:
    case = CASES[name]
    make_plan, prune = PLANS[wanted]
    assert_exact(
        lambda: case.build().to(DEVICE),
        lambda: _moved(case.batch()),
        make_plan,
        run=partial(_body, case),
        context=lambda: torch.autocast(DEVICE, torch.bfloat16, enabled=case.autocast),
        loss_fn=lambda output: loss_of(case, output),
        prune=prune,
        must_replay=False,
    )


class _Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(128, 384)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 64)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = y.transpose(1, 2).flatten(-2) + x
        return out


@pytest.mark.parametrize("policy", ["auto", "calls"])
def test_attention_without_dropout(policy: str) -> None:
    model = nn.Sequential(*(_Attending() for _ in range(6))).to(DEVICE, torch.bfloat16)
    x = torch.randn(4, 256, 128, device=DEVICE, dtype=torch.bfloat16)
    peak = actckpt.measure(model, x, loss_fn=scalar_loss, steps=1).added_bytes
    actckpt.optimize(
        model, 0.7 * peak / 1e9, batch=x, loss_fn=scalar_loss, policy=policy, scope="activations"
    )
    scalar_loss(model(x)).backward()  # the first run compares what comes back bit by bit
