"""Recomputed steps are bitwise the untouched ones: shapes of regions, arguments and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from actckpt.data.plan import Plan
from tests.exact import MakePlan, assert_exact, halves, plan, region
from tests.models.blocks import WIDTH, Chain, Residual, chain, rows

SHAPES: dict[str, Plan] = {
    "each block": plan("blocks.0", "blocks.1", "blocks.2", "blocks.3"),
    "one block": plan("blocks.2"),
    "pairs": plan(region("blocks.0", "blocks.1"), region("blocks.2", "blocks.3")),
    "whole chain": plan(region("blocks.0", "blocks.3")),
    "tree": plan(halves("blocks", 0, 3)),
    "right spine": plan(region("blocks.0", "blocks.1"), "blocks.2", "blocks.3"),
    "deep left": plan(
        region(
            "blocks.0",
            "blocks.3",
            region("blocks.0", "blocks.2", region("blocks.0", "blocks.1", region("blocks.0"))),
        )
    ),
    "split with a gap": plan(
        region("blocks.0", "blocks.3", region("blocks.0"), region("blocks.2"))
    ),
    "same span twice": plan(region("blocks.0", "blocks.1", region("blocks.0", "blocks.1"))),
    "descend": plan(region("blocks.1", None, region("blocks.1.linear"))),
    "descend twice": plan(
        region("blocks.1", None, region("blocks.1.norm"), region("blocks.1.linear"))
    ),
    "descend in a span": plan(
        region("blocks.0", "blocks.2", region("blocks.1.linear"), region("blocks.2"))
    ),
    "descend in a split": plan(
        region(
            "blocks.0",
            "blocks.3",
            region("blocks.0", "blocks.1", region("blocks.1", None, region("blocks.1.drop"))),
            region("blocks.2", "blocks.3", region("blocks.3.norm")),
        )
    ),
    "root": plan(""),
    "root and blocks": plan(region("", None, region("blocks.0", "blocks.1"), region("blocks.3"))),
    "root and tree": plan(region("", None, halves("blocks", 0, 3))),
}


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("wanted", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_of_region_tree(wanted: Plan, p: float) -> None:
    assert_exact(chain(4, p), rows, wanted)


@pytest.mark.parametrize("wanted", [SHAPES["tree"], SHAPES["root and tree"]])
def test_input_that_requires_grad(wanted: Plan) -> None:
    assert_exact(chain(4, 0.2), lambda: rows(requires_grad=True), wanted)


# Arguments and outputs


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclass
class Packet:
    x: torch.Tensor
    note: str = "kept"
    scale: float = 2.0


class TakesMany(nn.Module):
    """Arguments of every kind that a replay must be able to make again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(
        self,
        packet: Packet,
        table: dict[str, torch.Tensor],
        pair: Pair,
        *more: torch.Tensor,
        mask: torch.Tensor | None = None,
        mode: str = "a",
        **rest: Any,
    ) -> tuple[Packet, dict[str, torch.Tensor]]:
        assert packet.note == "kept"
        assert mode == "b"
        y = self.linear(packet.x).tanh() * packet.scale + table["bias"] + pair.left * pair.right
        for t in more:
            y = y + t.sin()
        if mask is not None:
            y = y.masked_fill(mask, 0.25)
        y = y * rest["factor"].exp()
        return Packet(y, scale=0.5), {"bias": y.sigmoid()}


class GivesMany(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = TakesMany()
        self.b = TakesMany()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(x.shape[1]) % 3 == 0
        packet, table = Packet(x), {"bias": x.cos()}
        for block in (self.a, self.b):
            packet, table = block(
                packet, table, Pair(x, packet.x), x, x, mask=mask, mode="b", factor=x
            )
        return packet.x + table["bias"]


@pytest.mark.parametrize("wanted", [plan("a", "b"), plan(region("a", "b")), plan("a"), plan("b")])
def test_dataclasses_dicts_tuples_keywords_and_a_tensor_passed_twice(wanted: Plan) -> None:
    assert_exact(GivesMany, lambda: rows(requires_grad=True), wanted)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.linear(x).tanh().chunk(2, -1)
        return a, b.exp()


class UsesOutputs(nn.Module):
    """Uses the two outputs of its stages separately, late, or not at all."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.one, self.two, self.use = TwoOutputs(), TwoOutputs(), use

    def forward(self, x: torch.Tensor) -> Any:
        a, b = self.one(x)
        c, d = self.two(a)
        if self.use == "first":
            return c
        if self.use == "second":
            return d
        if self.use == "across":
            return c.sin() + b
        return {"c": c, "b": b, "d": d.detach()}


@pytest.mark.parametrize("use", ["first", "second", "across", "all"])
@pytest.mark.parametrize("wanted", [plan("one", "two"), plan(region("one", "two"))])
def test_outputs_used_separately_or_not_at_all(use: str, wanted: Plan) -> None:
    assert_exact(lambda: UsesOutputs(use), rows, wanted)


class Gather(nn.Module):
    """A stage that reads outputs of several earlier stages, and older tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(p=0.1) for _ in range(3)])
        self.join = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.blocks[0](x)
        b = self.blocks[1](a)
        c = self.blocks[2](a)
        out: torch.Tensor = self.join(b, c)
        return out


def test_links_that_are_no_chain() -> None:
    assert_exact(Gather, rows, plan("blocks.0", "blocks.1", "blocks.2", "join"))
    assert_exact(Gather, rows, plan(region("blocks.0", "blocks.2")))
    assert_exact(Gather, rows, plan(region("blocks.0", "join")))
    assert_exact(Gather, rows, plan(region("blocks.0", "join", region("blocks.0", "blocks.1"))))


# Modules of torch


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.2, batch_first=True)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, state = self.lstm(x)
        z, _ = self.gru(y)
        out: torch.Tensor = self.head(z) + state[0].mean()
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, weights = self.attention(x, x, x)
        result: torch.Tensor = out + weights.mean()
        return result


def sequences() -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 5, WIDTH, generator=g)


def encoder() -> nn.Module:
    return Chain(
        *(nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=True) for _ in range(3))
    )


def decoder() -> nn.Module:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                [nn.TransformerDecoderLayer(WIDTH, 2, 16, batch_first=True) for _ in range(2)]
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            y = x
            for layer in self.layers:
                y = layer(y, x, tgt_mask=mask, tgt_is_causal=True)
            return y

    return Decoder()


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (Recurrent, plan("lstm", "gru")),
        (Recurrent, plan(region("lstm", "gru"))),
        (Recurrent, plan(region("", None, region("lstm"), region("gru")))),
        (Attention, plan("attention")),
        (Attention, plan("")),
        (encoder, plan("blocks.0", "blocks.1", "blocks.2")),
        (encoder, plan(halves("blocks", 0, 2))),
        (encoder, plan(region("blocks.0", None, region("blocks.0.self_attn")))),
        (encoder, plan(region("blocks.1", None, region("blocks.1.linear1", "blocks.1.linear1")))),
        (decoder, plan(region("layers.0", "layers.1"))),
    ],
)
def test_modules_of_torch(make: Callable[[], nn.Module], wanted: Plan) -> None:
    assert_exact(make, sequences, wanted)


# Parameters


def tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, WIDTH)
            self.block = Residual(p=0.1)
            self.head = nn.Linear(WIDTH, 11)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.block(self.embed(tokens)))
            return out

    return Tied()


def test_tied_weights() -> None:
    def batch() -> torch.Tensor:
        return torch.arange(6).view(2, 3)

    assert_exact(tied, batch, plan("embed", "block", "head"))
    assert_exact(tied, batch, plan(region("embed", "head")))
    assert_exact(tied, batch, plan(""))


def frozen(*names: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = chain(4, 0.1)()
        for name, p in model.named_parameters():
            if any(n in name for n in names):
                p.requires_grad_(False)
        return model

    return make


@pytest.mark.parametrize(
    "names",
    [("blocks.0", "blocks.1"), ("blocks.2",), ("linear",), ("norm", "bias"), ("blocks.0.norm",)],
)
@pytest.mark.parametrize("shape", ["each block", "whole chain", "tree", "root and tree"])
def test_frozen_and_partly_frozen_chains(names: tuple[str, ...], shape: str) -> None:
    assert_exact(frozen(*names), rows, SHAPES[shape])


class WeightAsArgument(nn.Module):
    """Its stages are given a parameter, a view of one and a detached one as arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.block = Mixes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block(x, self.weight, self.weight.t(), self.weight.detach())
        return out


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(
        self, x: torch.Tensor, w: torch.Tensor, v: torch.Tensor, d: torch.Tensor
    ) -> torch.Tensor:
        y = (x @ w).tanh() @ v
        y = (y.sigmoid() @ d).sin() @ self.own.detach()
        return (y.tanh() @ self.own).exp()


@pytest.mark.parametrize("prune", [False, True])
def test_parameters_as_arguments_and_detached(prune: bool) -> None:
    from tests.exact import saving

    def wanted(graph: Any) -> Plan:
        return plan(region("block", saved=saving(graph, "block", "aten.tanh", "aten.sin")))

    assert_exact(WeightAsArgument, rows, wanted if prune else plan("block"), prune=prune)


def test_deep_chain_in_a_binary_tree() -> None:
    seen = assert_exact(chain(16, 0.1), rows, plan(halves("blocks", 0, 15)), steps=2)
    # 16 leaves, and each of the 15 inner nodes once
    assert seen.replays == 2 * 31


def test_shared_module_called_several_times() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual(p=0.2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self.block(x)
            return x

    every: list[MakePlan | Plan] = [
        plan(region(("block", 0)), region(("block", 2))),
        plan(region(("block", 0), ("block", 2))),
        plan(region(("block", 0), ("block", 2), region(("block", 1)))),
        plan(region("", None, region(("block", 1)), region(("block", 2)))),
    ]
    for wanted in every:
        assert_exact(Shared, rows, wanted)
