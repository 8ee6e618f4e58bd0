"""Forwards that run more in one step than in another: drawn, or grown since they were planned."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import actckpt
from actckpt.session.session import session_of
from actckpt.tracing.fake import random_states
from tests.loop_peaks import loop_peak, other_bits, weights
from tests.models.blocks import Residual

pytestmark = pytest.mark.usefixtures("flat_profile")

DEPTH = 6


class Dropping(nn.Module):
    """Residual blocks of which a part is left out."""

    def __init__(self, keeps: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Residual(p=0.1) for _ in range(DEPTH))
        self.keeps = keeps
        self.depth = DEPTH

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks[: self.depth]:
            if self.keeps(self):
                x = block(x)
        return x.square().mean()


DRAWS: dict[str, Callable[[nn.Module], bool]] = {
    "LayerDrop": lambda m: not (m.training and bool(torch.rand([]) < 0.3)),
    "stochastic depth": lambda m: torch.bernoulli(torch.tensor(0.7)).item() == 1.0,
    "Python": lambda m: random.random() > 0.3,
    "NumPy": lambda m: bool(np.random.uniform() < 0.7),
}


def loop(model: Dropping, x: torch.Tensor, seeds: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The weights after steps of a loop and their peaks; the draws of each are its seed's."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    peaks = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

        def one() -> None:
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()

        peaks.append(loop_peak(one, model, optimizer, x))
    return weights([model]), peaks


def notes_of(model: nn.Module) -> tuple[str, ...]:
    """The report's notes, without the bound, for which it asks a solver."""
    session = session_of(model)
    assert session is not None
    assert session.current is not None
    return session.current.report.notes


@pytest.mark.kind("a forward that draws which of its layers run", bits=True, peak="within")
@pytest.mark.parametrize(
    ("name", "policy"), [("LayerDrop", "calls"), *((name, "auto") for name in DRAWS)]
)
def test_planned_for_all_that_can_run(name: str, policy: str) -> None:
    torch.manual_seed(0)
    untouched = Dropping(DRAWS[name])
    planned = copy.deepcopy(untouched)
    x = torch.randn(1024, 8)
    everything = Dropping(lambda _: True)
    _, full = loop(everything, x, 2)
    budget = 0.6 * full[-1]
    torch.manual_seed(1)
    actckpt.optimize(
        planned, budget / 1e9, batch=x, policy=policy,
        optimizer=torch.optim.AdamW(planned.parameters()),
    )  # fmt: skip
    assert any("draws which of its parts run" in n for n in notes_of(planned))
    expected, without = loop(untouched, x, 4)
    found, peaks = loop(planned, x, 4)
    assert not other_bits(expected, found)
    assert max(peaks) <= budget < max(without)


@pytest.mark.kind("a forward that grows from step to step", bits=True, peak="said")
@pytest.mark.parametrize("policy", ["auto", "calls"])
def test_planned_again_when_a_larger_one_is_seen(
    policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As in progressive training: nothing that could be seen beforehand says so."""
    torch.manual_seed(0)
    untouched = Dropping(lambda _: True)
    planned = copy.deepcopy(untouched)
    x = torch.randn(1024, 8)
    _, full = loop(copy.deepcopy(untouched), x, 2)
    budget = 0.6 * full[-1]
    for model in (untouched, planned):
        model.depth = 2
    actckpt.optimize(
        planned, budget / 1e9, batch=x, policy=policy,
        optimizer=torch.optim.AdamW(planned.parameters()),
    )  # fmt: skip
    found: Any = None
    for depth in (2, DEPTH, DEPTH):
        for model in (untouched, planned):
            model.depth = depth
        expected, _ = loop(untouched, x, 2)
        found, peaks = loop(planned, x, 2)
        assert not other_bits(expected, found)
    assert "planning again" in caplog.text.lower()
    assert max(peaks) <= budget


def test_every_generator_is_steered() -> None:
    from actckpt.tracing.draws import Draws, steer

    for draws, low, high in ((Draws.HIGH, 0.99, 1.0), (Draws.LOW, 0.0, 0.01)):
        with random_states():
            steer(draws)
            found = [random.random(), random.uniform(0, 1), *np.random.rand(200).tolist()]
            found += [torch.rand([]).item() for _ in range(200)]
            found += torch.rand(8, dtype=torch.float64).tolist()
            assert all(low <= value <= high for value in found)
            # whoever draws until it fits comes to an end
            np.random.normal(size=9)
            random.shuffle(list(range(50)))
            np.random.permutation(50)


@pytest.mark.kind("Wav2Vec2 with its LayerDrop", bits=True, peak="within")
def test_wav2vec2_as_it_comes() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        vocab_size=12, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 4),
        num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        layerdrop=0.2, mask_time_length=2, mask_time_min_masks=1, ctc_loss_reduction="mean",
    )  # fmt: skip
    torch.manual_seed(0)
    untouched = transformers.Wav2Vec2ForCTC(config).train()
    planned = copy.deepcopy(untouched)
    everything = copy.deepcopy(untouched)
    everything.wav2vec2.encoder.config.layerdrop = 0.0
    speech = torch.randn(2, 8000)
    labels = torch.randint(1, 12, (2, 6))

    def peaks(model: nn.Module) -> list[int]:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        found = []
        for seed in range(3):
            torch.manual_seed(seed)
            np.random.seed(seed)

            def one() -> None:
                model(speech, labels=labels).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            found.append(loop_peak(one, model, speech, labels))
        return found

    budget = 0.7 * max(peaks(everything))
    actckpt.optimize(planned, budget / 1e9, optimizer=torch.optim.SGD(planned.parameters(), 0.01))
    assert max(peaks(planned)) <= budget < max(peaks(untouched))
    assert not other_bits(weights([untouched]), weights([planned]))
