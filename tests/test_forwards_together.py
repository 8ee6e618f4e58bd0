"""Several forwards before a backward: each is planned with what the others hold in mind."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.budget_error import BudgetError
from actckpt.session.planner import Planner
from actckpt.session.session import Session, session_of
from tests.loop_peaks import loop_peak, other_bits, weights
from tests.models.blocks import Residual
from tests.test_forwards_in_backward import tiny_bert

pytestmark = pytest.mark.usefixtures("flat_profile")


class Encoder(nn.Module):
    """Rows in, an embedding for each 128 of them out."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(p=0.1) for _ in range(depth))

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        if state is not None:
            x = x + state.repeat_interleave(128, 0)
        for block in self.blocks:
            x = block(x)
        return x.view(-1, 128, 8).mean(1)


Models = list[Encoder]
Step = Callable[[Models, torch.Tensor], None]


def contrastive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b[: len(a)].T).logsumexp(1).mean()


def simcse(models: Models, x: torch.Tensor) -> None:
    """The same batch twice, under two dropouts."""
    contrastive(models[0](x), models[0](x)).backward()


def bi_encoder(models: Models, x: torch.Tensor) -> None:
    """Short queries and long documents."""
    contrastive(models[0](x[:1024]), models[0](x)).backward()


def carried(models: Models, x: torch.Tensor) -> None:
    """A state that goes through four steps before backward goes back through them."""
    state = torch.zeros(len(x) // 4 // 128, 8)
    for part in x.chunk(4):
        state = models[0](part, state)
    state.square().mean().backward()


def towers(models: Models, x: torch.Tensor) -> None:
    """Two models, each optimized by itself."""
    contrastive(models[0](x), models[1](x)).backward()


def adversarial(models: Models, x: torch.Tensor) -> None:
    """The first model's graph is alive while the second one takes a step of its own."""
    made = models[0](x).repeat_interleave(128, 0)
    (models[1](x).square().mean() - models[1](made.detach()).square().mean()).backward()
    models[1].zero_grad()
    models[1](made).mean().backward()


def loop(models: Models, step: Step, steps: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The peak of each step, and the weights after all."""
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(1))
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in models]
    peaks = []
    for seed in range(steps):
        torch.manual_seed(seed)

        def one() -> None:
            step(models, x)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        peaks.append(loop_peak(one, *models, *optimizers, x))
    return peaks, weights(models)


@pytest.mark.kind("several forwards before a backward", bits=True, peak="within")
@pytest.mark.parametrize(
    ("step", "policy"),
    [
        (simcse, "auto"), (bi_encoder, "calls"), (carried, "calls"), (towers, "calls"),
        (adversarial, "calls"),
    ],
)  # fmt: skip
def test_planned_together(step: Step, policy: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    several = step in (towers, adversarial)
    untouched = [Encoder() for _ in range(1 + several)]
    planned = copy.deepcopy(untouched)
    without, expected = loop(untouched, step, 4)
    budget = 0.65 * without[-1]
    for model in planned:
        actckpt.optimize(model, budget / 1e9, policy=policy)
    peaks, found = loop(planned, step, 4)
    assert not other_bits(expected, found)
    # what comes together is seen in the first step, and said before it happens
    assert peaks[0] <= budget or "alive at once" in caplog.text
    assert max(peaks[1:]) <= budget
    notes = current(planned[-1]).report.notes
    assert any("several forwards are alive" in note for note in notes)


def current(model: nn.Module) -> Any:
    session = session_of(model)
    assert isinstance(session, Session)
    assert session.current is not None
    return session.current


def test_a_steady_loop_plans_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Encoder()
    peaks, _ = loop([copy.deepcopy(model)], carried, 2)
    actckpt.optimize(model, 0.65 * peaks[-1] / 1e9, policy="calls")
    made: list[int] = []
    make = Planner.make

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return make(*args, **kwargs)

    monkeypatch.setattr(Planner, "make", counted)
    after: list[int] = []

    def step(models: Models, x: torch.Tensor) -> None:
        carried(models, x)
        after.append(len(made))

    loop([model], step, 5)
    assert after[2:] == [after[2]] * 3


@pytest.mark.kind("several forwards that do not fit together", peak="said")
def test_what_cannot_be_held_is_said() -> None:
    model = Encoder()
    alone = actckpt.measure(model, torch.randn(4096, 8), loss_fn=torch.sum).peak_bytes
    actckpt.optimize(model, 0.75 * alone / 1e9, policy="full")
    with pytest.raises(BudgetError, match=r"one of \d+ forwards whose graphs are alive at once"):
        loop([model], lambda ms, x: sum(ms[0](x).sum() for _ in range(8)).backward(), 4)


def test_graphs_that_are_gone_or_used_do_not_count() -> None:
    from actckpt.session import company

    model = Encoder()
    actckpt.optimize(model, 1.0)
    x = torch.randn(256, 8)
    session = session_of(model)
    assert session is not None

    def beside() -> int:
        return len(company._NOW.company.members) - 1 if company._NOW.company else 0

    loss = model(x).sum()
    loss.backward()
    loss = model(x).sum()  # of the last one only nodes are left
    assert beside() == 0
    kept = model(x)
    assert beside() == 1
    with torch.no_grad():
        model(x)
    del loss
    gc.collect()
    again = model(x)
    assert beside() == 1
    del kept, again
    model(x)
    assert beside() == 0


def test_a_step_by_itself_is_planned_as_before() -> None:
    torch.manual_seed(0)
    model = Encoder()
    other = copy.deepcopy(model)
    x = torch.randn(2048, 8)
    budget = 0.6 * actckpt.measure(model, x, loss_fn=torch.sum).peak_bytes
    for m in (model, other):
        actckpt.optimize(m, budget / 1e9, batch=x, loss_fn=torch.sum, policy="calls")
    for _ in range(3):
        model(x).sum().backward()
        model.zero_grad()
    assert current(model).planned.plan == current(other).planned.plan
    assert not current(model).room


@pytest.mark.kind("bi-encoder of sentence-transformers", bits=True, peak="within")
def test_a_bi_encoder_of_sentence_transformers(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    tiny_bert(pytest.importorskip("transformers"), tmp_path)

    def train(budget_gb: float | None) -> tuple[list[int], dict[str, torch.Tensor]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        loss = losses.MultipleNegativesRankingLoss(model)
        if budget_gb is not None:
            actckpt.optimize(model, budget_gb, policy="calls", optimizer=optimizer)
        peaks = []
        for seed in range(3):
            g = torch.Generator().manual_seed(seed)
            tokens = [torch.randint(5, 100, (32, n), generator=g) for n in (16, 48)]
            batch = [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in tokens]
            torch.manual_seed(seed)

            def one(batch: Any = batch) -> None:
                loss(batch, torch.zeros(32, dtype=torch.long)).backward()
                optimizer.step()
                optimizer.zero_grad()

            peaks.append(loop_peak(one, model, optimizer, batch))
        return peaks, weights([model])

    without, expected = train(None)
    budget = 0.7 * without[-1]
    peaks, found = train(budget / 1e9)
    assert not other_bits(expected, found)
    assert max(peaks[1:]) <= budget
