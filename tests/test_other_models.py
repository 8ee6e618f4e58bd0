"""Models that run in the step of a planned one and are not planned: what they take is said."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import actckpt
from actckpt.session.neighbours import neighbours
from tests.loop_peaks import loop_peak

pytestmark = pytest.mark.usefixtures("flat_profile")
SAID = "that is not trained"


class Lm(nn.Module):
    """Token ids in, the log-likelihood of each row out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3)
        )
        self.head = nn.Linear(16, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        taken: torch.Tensor = self.head(x).log_softmax(-1).gather(-1, ids[..., None])
        return taken.squeeze(-1).sum(-1)


def reference_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def preferences(model: nn.Module, reference: nn.Module, steps: int) -> list[int]:
    """The peak of each of some steps of direct preference optimization."""
    ids = torch.randint(64, (8, 128), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        own = model(ids)
        with torch.no_grad():
            expected = reference(ids)
        better, worse = (own - expected).chunk(2)
        (-nn.functional.logsigmoid(better - worse)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return [loop_peak(step, model, optimizer, ids) for _ in range(steps)]


@pytest.mark.kind("a reference model that runs in the step", peak="said")
def test_a_reference_model_is_said_before_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Lm()
    reference = reference_of(model)
    budget = 0.7 * preferences(copy.deepcopy(model), reference, 2)[-1]
    caplog.clear()
    actckpt.optimize(model, budget / 1e9, policy="calls")
    peaks = preferences(model, reference, 3)
    assert max(peaks) > budget  # else there is nothing to say
    (said,) = [r.message for r in caplog.records if SAID in r.message]
    assert "a Lm" in said
    assert any("Lm of" in note and "counted" in note for note in actckpt.report(model).notes)


def test_only_what_is_another_model_counts_as_one() -> None:
    linear = nn.Linear(64, 64)
    model = nn.Sequential(linear, nn.Tanh())
    teacher = reference_of(model)
    own = nn.ModuleDict({"model": model, "teacher": teacher, "loss": nn.MSELoss()})
    tied = nn.Linear(64, 64)
    tied.weight, tied.bias = linear.weight, linear.bias
    part = nn.Sequential(linear)
    small = nn.Linear(2, 2)
    absent = nn.Linear(64, 64, device="meta")
    found = [n for n in neighbours(model) if n.held_bytes in (64 * 65 * 4, 2 * 3 * 4)]
    names = [n.name for n in found if n.frozen]
    assert names.count("Sequential") == 1
    everything = (own, tied, part, small, absent)
    assert len({id(m) for m in everything}) == 5


def test_an_optimized_model_takes_part_by_itself() -> None:
    model, other = nn.Linear(60, 60), nn.Linear(60, 61)
    before = [n.held_bytes for n in neighbours(model)]
    actckpt.optimize(other, 1.0)
    after = [n.held_bytes for n in neighbours(model)]
    size = 61 * 61 * 4
    assert before.count(size) - after.count(size) == 1


def test_nothing_is_said_of_copies_that_are_trained(caplog: pytest.LogCaptureFixture) -> None:
    model = Lm()
    untouched = copy.deepcopy(model)
    actckpt.optimize(model, 1.0)
    model(torch.randint(64, (2, 8))).sum().backward()
    assert SAID not in caplog.text
    assert any("Lm of" in note for note in actckpt.report(model).notes)
    del untouched
