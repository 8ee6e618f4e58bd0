"""Forwards and losses that ask whether something holds of their activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.graph import Graph
from actckpt.errors import TraceError
from actckpt.session.session import session_of
from actckpt.tracing.call import Call
from actckpt.tracing.step import Step
from tests.loop_peaks import loop_peak, other_bits, weights
from tests.models.blocks import Residual, rows

pytestmark = pytest.mark.usefixtures("flat_profile")


class Guarded(nn.Module):
    """Blocks with a question between them; ``fires`` makes its guard fire."""

    def __init__(self, ask: Callable[[Guarded, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first = nn.ModuleList(Residual() for _ in range(2))
        self.last = nn.ModuleList(Residual() for _ in range(2))
        self.code = nn.Buffer(torch.ones(8))
        self.ask = ask
        self.fires = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.first:
            x = block(x)
        x = self.ask(self, x)
        for block in self.last:
            x = block(x)
        return x.square().mean()


def boxes(model: Guarded, x: torch.Tensor) -> torch.Tensor:
    """As in a box loss."""
    if not (x.exp() >= 0).all():
        raise ValueError("degenerate boxes")
    return x


def reset(model: Guarded, x: torch.Tensor) -> torch.Tensor:
    """As in a codebook that replaces what is not used."""
    unused = x.detach().mean(0) > (-1e9 if model.fires else 1e9)
    if unused.any():
        with torch.no_grad():
            model.code.copy_(torch.where(unused, x.detach().mean(0), model.code))
    return x * model.code


def asserted(model: Guarded, x: torch.Tensor) -> torch.Tensor:
    """A comparison that must hold, and one that must not."""
    if not bool(x.detach().abs().max() < 1e9):
        raise AssertionError
    if x.detach().abs().max() > 1e9:
        raise ValueError("exploded")
    if not torch.equal(x, x.clone()):
        raise AssertionError
    return x


ASKS = {f.__name__: f for f in (boxes, reset, asserted)}


@pytest.mark.kind("a forward that asks whether a guard fires", bits=True, peak="within")
@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize(("policy", "lazily"), [("auto", False), ("calls", False), ("calls", True)])
def test_planned_as_if_no_guard_fires(ask: Any, policy: str, lazily: bool) -> None:
    torch.manual_seed(0)
    untouched = Guarded(ask)
    planned = copy.deepcopy(untouched)
    x = rows(2048)

    def train(model: Guarded) -> list[int]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def one() -> None:
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()

        return [loop_peak(one, model, x) for _ in range(2)]

    without = train(untouched)
    budget = 0.8 * without[-1]
    optimizer = torch.optim.SGD(planned.parameters(), 0.1)
    actckpt.optimize(
        planned, budget / 1e9, batch=None if lazily else x, policy=policy, optimizer=optimizer
    )
    assert max(train(planned)) <= budget
    assert not other_bits(weights([untouched]), weights([planned]))
    session = session_of(planned)
    assert session is not None
    assert session.current is not None
    assert session.current.planned.plan.regions or session.current.planned.plan.bursts
    notes = session.current.report.notes
    assert any("as if no guard fires" in n and "test_guards.py:" in n for n in notes)
    # a step in which it does is exact, too
    untouched.fires = planned.fires = True
    train(untouched)
    train(planned)
    assert not other_bits(weights([untouched]), weights([planned]))


def test_a_real_error_is_the_model_s_own() -> None:
    """Turning answers round does not hide what is wrong for another reason."""

    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            if (x > 3).any():
                x = x + 1
            return x @ torch.ones(5, 5)

    with pytest.raises(RuntimeError, match=r"reduction dim|shapes cannot be multiplied"):
        actckpt.optimize(Wrong(), 1.0, batch=rows())


@pytest.mark.kind("a forward that needs values of its activations", peak="said")
def test_what_asks_for_numbers_is_named() -> None:
    class Matched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(Residual(), Residual())
            self.head = nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.head(self.backbone(x))
            order = x.detach().numpy().argsort(0)
            return x[torch.from_numpy(order[:, 0].copy())].cumsum(0).mean()

    model = Matched()
    with pytest.raises(TraceError) as caught:
        actckpt.optimize(model, 1.0, batch=rows())
    said = str(caught.value)
    assert "the forward of the model" in said
    assert "test_guards.py" in said
    assert "x.detach().numpy()" in said
    assert "actckpt.optimize(model.backbone, ...)" in said
    assert len(said.splitlines()) <= 10
    actckpt.optimize(model.backbone, 1.0)
    model(rows()).backward()


@pytest.mark.kind("DETR: a loss that matches boxes", bits=True, peak="said")
def test_detr_says_what_can_be_optimized() -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=[32, 32], patch_size=16, num_detection_tokens=4, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    untouched = transformers.YolosForObjectDetection(config).train()
    planned = copy.deepcopy(untouched)
    g = torch.Generator().manual_seed(0)
    labels = [
        {"class_labels": torch.tensor([1]), "boxes": torch.rand(1, 4, generator=g) * 0.4 + 0.2}
    ]
    batch = {"pixel_values": torch.randn(1, 3, 32, 32, generator=g), "labels": labels}
    with pytest.raises(TraceError, match=r"linear_sum_assignment[\s\S]*optimize\(model\.vit"):
        actckpt.optimize(planned, 1.0, batch=batch)
    actckpt.optimize(planned.vit, None, policy="full")
    for model in (untouched, planned):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not other_bits(weights([untouched]), weights([planned]))


def test_what_was_supposed_goes_with_the_graph() -> None:
    graph = actckpt.trace(Guarded(boxes), rows())
    assert graph.supposed
    assert Graph.from_json(graph.to_json()) == graph
    assert Step(Call(rows())).answers == ()
