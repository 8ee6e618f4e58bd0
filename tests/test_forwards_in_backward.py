"""Forwards that a hook or a Function of the user's runs while backward is under way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.session.session import session_of
from tests.exact import same_bits
from tests.loop_peaks import loop_peak, other_bits, weights
from tests.models.blocks import chain

pytestmark = pytest.mark.usefixtures("flat_profile")

Step = Callable[[nn.Module, torch.Tensor], None]
make = chain(4, p=0.1)


def cached_loss(model: nn.Module, x: torch.Tensor) -> None:
    """GradCache: embeddings without a graph, their gradients, then each part once more."""
    parts = x.chunk(4)
    states = []

    def embedded(part: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(part)
        return out.view(-1, 64, 8).mean(1)

    with torch.no_grad():
        found = []
        for part in parts:
            states.append(torch.get_rng_state())
            found.append(embedded(part))
    cached = torch.cat(found).requires_grad_()
    loss = (cached.T @ cached).square().mean()

    def again(gradient: torch.Tensor) -> None:
        with torch.enable_grad():
            for part, state, g in zip(parts, states, gradient.chunk(4), strict=True):
                torch.set_rng_state(state)
                (embedded(part) * g).sum().backward()

    cached.register_hook(again)
    loss.backward()


class _Again(torch.autograd.Function):
    """A checkpoint wrapper of the user's own."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: torch.Tensor) -> Any:
        ctx.run, ctx.state = run, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            out = ctx.run(x)
        torch.autograd.backward(out, g)
        return None, x.grad


def wrapped(model: nn.Module, x: torch.Tensor) -> None:
    _Again.apply(model, x.clone().requires_grad_()).square().mean().backward()  # type: ignore[no-untyped-call]


@pytest.mark.kind("a forward inside a backward hook", bits=True, peak="within")
@pytest.mark.parametrize("policy", ["auto", "calls"])
@pytest.mark.parametrize("step", [cached_loss, wrapped])
def test_planned_within_backward(step: Step, policy: str) -> None:
    """The first forward with gradients is one that backward runs, and so is each later one."""
    torch.manual_seed(0)
    untouched = make()
    planned = copy.deepcopy(untouched)
    x = torch.randn(4096, 8)
    models = (untouched, planned)
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in models]

    def one(n: int) -> None:
        step(models[n], x)
        optimizers[n].step()
        optimizers[n].zero_grad()

    first = weights([untouched])
    for _ in range(2):
        one(0)
    full = loop_peak(lambda: one(0), untouched, optimizers[0], x)
    untouched.load_state_dict({k.split(" ", 1)[1]: v for k, v in first.items()})
    optimizers[0] = torch.optim.AdamW(untouched.parameters(), 0.01)
    budget = 0.75 * full
    actckpt.optimize(planned, budget / 1e9, optimizer=optimizers[1], policy=policy)
    for seed in range(3):
        for n in (0, 1):
            torch.manual_seed(seed)
            one(n)
        assert not other_bits(weights([untouched]), weights([planned]))
    plan = actckpt.report(planned).plan
    assert plan.regions or plan.bursts
    assert loop_peak(lambda: one(1), planned, optimizers[1], x) <= budget


@pytest.mark.kind("cached contrastive loss of sentence-transformers", bits=True, peak="within")
def test_the_cached_loss_of_sentence_transformers(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    transformers = pytest.importorskip("transformers")
    tiny_bert(transformers, tmp_path)

    def feature(seed: int, length: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        tokens = torch.randint(5, 100, (16, length), generator=g)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def loop(budget_gb: float | None) -> tuple[int, dict[str, torch.Tensor]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
        if budget_gb is not None:
            actckpt.optimize(model, budget_gb, optimizer=optimizer, policy="calls")

        def one(seed: int) -> None:
            torch.manual_seed(seed)
            batch = [feature(seed, 32), feature(seed + 9, 32)]
            loss(batch, torch.zeros(16, dtype=torch.long)).backward()
            optimizer.step()
            optimizer.zero_grad()

        for seed in range(3):
            one(seed)
        after = weights([model])
        return loop_peak(lambda: one(3), model, optimizer), after

    full, expected = loop(None)
    peak, found = loop(0.75 * full / 1e9)
    assert not other_bits(expected, found)
    assert peak <= 0.75 * full


def tiny_bert(transformers: Any, directory: Path) -> None:
    """Writes a small BERT with random weights and a tokenizer of a hundred words."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(95))]
    words = {name: n for n, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    ).save_pretrained(directory)  # fmt: skip
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(directory)


class _Reversible(torch.autograd.Function):
    """Saves what comes out at the end; backward makes what went into each part again from it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parts: list[nn.Module]) -> Any:
        a, b = x.chunk(2, -1)
        for part in parts:
            a, b = b, a + part(b)
        ctx.parts, ctx.ends = parts, (a.detach(), b.detach())
        return torch.cat([a, b], -1)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        (a, b), (ga, gb) = ctx.ends, g.chunk(2, -1)
        del ctx.ends
        for part in reversed(ctx.parts):
            with torch.enable_grad():
                before = a.detach().requires_grad_()
                out = part(before)
            torch.autograd.backward(out, gb)
            a, b = b - out.detach(), before.detach()
            ga, gb = gb, ga + before.grad
            del out, before
        return torch.cat([ga, gb], -1), None


class ReversibleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(chain(4)() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Reversible.apply(x.repeat(1, 2), list(self.parts))  # type: ignore[no-untyped-call]
        return out


def reversible(model: nn.Module, x: torch.Tensor) -> None:
    model(x.clone().requires_grad_()).square().mean().backward()


@pytest.mark.kind("a reversible net", bits=True, peak="said")
def test_a_reversible_net_names_what_can_be_planned_in_place_of_it() -> None:
    torch.manual_seed(0)
    untouched = ReversibleNet()
    model = copy.deepcopy(untouched)
    x = torch.randn(4096, 8)
    full = loop_peak(lambda: reversible(untouched, x), untouched, x)
    actckpt.optimize(model, 0.7 * full / 1e9, policy="calls")
    with pytest.raises(actckpt.BudgetError, match="runs forwards itself") as caught:
        reversible(model, x)
    assert "(parts.2, parts.1 and 1 more)" in str(caught.value)
    actckpt.revert(model)
    actckpt.optimize(model, None, policy="full")
    reversible(model, x)
    assert any("runs forwards itself" in note for note in actckpt.report(model).notes)
    session = session_of(model)
    assert session is not None
    assert session.current is not None
    graph = session.current.planned.graph
    assert graph.in_backward == ("parts.2", "parts.1", "parts.0")
    assert actckpt.Graph.from_json(graph.to_json()) == graph
    actckpt.revert(model)

    for part in model.parts:
        actckpt.optimize(part, None, policy="full")
    for n in range(2):
        for m in (untouched, model):
            m.zero_grad()
            reversible(m, x)
        pairs = zip(untouched.parameters(), model.parameters(), strict=True)
        assert all(same_bits(a.grad, b.grad) for a, b in pairs), n  # type: ignore[arg-type]
    model.zero_grad()
    assert loop_peak(lambda: reversible(model, x), model, x) <= 0.7 * full
