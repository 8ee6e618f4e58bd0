"""Several backward passes over one graph: each recomputes, and keeps no more than it found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from actckpt.tracing.call import Call
from tests.burst_plans import drawn, each_alone, everything
from tests.exact import (
    assert_exact,
    differences,
    enforce,
    halves,
    outcome,
    plan,
    region,
    saving,
    scalar_loss,
    watched,
)
from tests.models.blocks import WIDTH, Chain, Residual, chain, rows
from tests.suite import seeded
from tests.test_replay_memory import Captured, Live, no_collection, wide

PLANS: dict[str, Any] = {
    "each": plan(*(f"blocks.{i}" for i in range(4))),
    "spans": plan(region("blocks.0", "blocks.1"), region("blocks.2", "blocks.3")),
    "tree": plan(halves("blocks", 0, 3)),
    "root": plan(region("", None, halves("blocks", 0, 3))),
    "descend": plan(region("blocks.1", None, region("blocks.1.linear")), "blocks.3"),
    "one burst": everything,
    "a burst each": each_alone,
    "drawn 1": drawn(1),
    "drawn 2": drawn(2),
}
SOME = ("each", "tree", "descend", "a burst each", "drawn 1")
plans = pytest.mark.parametrize("wanted", PLANS.values(), ids=PLANS.keys())
some = pytest.mark.parametrize("wanted", [PLANS[n] for n in SOME], ids=SOME)


class Normed(nn.Module):
    """A block with running statistics, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.drop(nn.functional.gelu(self.linear(self.norm(x))))
        return out


def thrice(model: nn.Module, call: Call) -> Any:
    """A backward per task over one graph."""
    output = model(*call.args)
    for n in range(3):
        (output[:, n:].sin() * (n + 1)).sum().backward(retain_graph=n < 2)
    return output


def projected(model: nn.Module, call: Call) -> Any:
    """Gradients per task, combined: PCGrad, GradNorm."""
    output = model(*call.args)
    parameters = list(model.parameters())
    first = torch.autograd.grad(output[:, 0].sum(), parameters, retain_graph=True)
    second = torch.autograd.grad(output[:, 1:].square().sum(), parameters)
    for p, a, b in zip(parameters, first, second, strict=True):
        p.grad = a + b * (a * b).sum().sign()
    return output


def hessian_vector(model: nn.Module, call: Call) -> Any:
    """A product with the Hessian, then the gradient itself."""
    output = model(*call.args)
    parameters = list(model.parameters())
    loss = scalar_loss(output)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    product = torch.autograd.grad(
        sum(((s * s.detach()).sum() for s in slopes), torch.zeros(())),
        parameters,
        retain_graph=True,
    )
    loss.backward()
    return [output, *product]


def third_order(model: nn.Module, call: Call) -> Any:
    """Derivatives of derivatives of derivatives."""
    x = call.args[0].detach().requires_grad_()
    output = model(x)
    (one,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
    (two,) = torch.autograd.grad(one.square().sum(), x, create_graph=True)
    (output.mean() + two.square().mean()).backward()
    return [output, one, two]


def a_part_and_then_all(model: nn.Module, call: Call) -> Any:
    """The first backward needs few of the tensors that are made again for it."""
    output = model(*call.args)
    (last,) = torch.autograd.grad(
        output.sum(), [model.get_parameter("blocks.3.linear.weight")], retain_graph=True
    )
    scalar_loss(output).backward()
    return [output, last]


def a_head_let_go_of_before(model: nn.Module, call: Call) -> Any:
    """A backward that keeps its graph, after one over another part of it that did not."""
    output = model(*call.args)
    (first,) = torch.autograd.grad(output.sum(), [model.get_parameter("blocks.3.linear.bias")])
    again = model(*call.args)
    scalar_loss(again).backward(retain_graph=True)
    scalar_loss(again).backward()
    return [output, first, again]


RUNS = [thrice, projected, hessian_vector, third_order, a_part_and_then_all,
        a_head_let_go_of_before]  # fmt: skip


@some
@pytest.mark.parametrize("run", RUNS, ids=[f.__name__ for f in RUNS])
def test_bits(run: Any, wanted: Any) -> None:
    def make() -> nn.Module:
        return Chain(Normed(), Residual(p=0.2), Normed(), Residual(p=0.2))

    assert_exact(make, rows, wanted, run=run, steps=2 if run is thrice else 1)


def levels_of(make: Callable[[], nn.Module], wanted: Any) -> tuple[list[int], list[int]]:
    """(levels, peaks) after the forward, and of four backward passes over its graph."""
    model = seeded(make)()
    x = wide()
    if wanted is not None:
        enforce(model, x, wanted, check=False)
    with no_collection(), Live(x, *model.parameters()) as live:
        output = model(x)
        levels, peaks = [live.level], [live.peak]
        for n in range(4):
            live.peak = live.level
            output.backward(torch.ones_like(output), retain_graph=n < 3)
            levels.append(live.level)
            peaks.append(live.peak)
            model.zero_grad()
        del output
    assert live.level == 0
    return levels, peaks


@plans
@pytest.mark.kind("several backwards over one graph", bits=True)
def test_each_backward_needs_as_much_as_the_first_and_leaves_nothing(wanted: Any) -> None:
    gradients = sum(p.numel() * 4 for p in chain(4)().parameters())
    levels, peaks = levels_of(chain(4, 0.1), wanted)
    untouched, most = levels_of(chain(4, 0.1), None)
    assert levels[1:4] == [levels[0] + gradients] * 3
    assert peaks[1] == peaks[2] == peaks[3]
    assert peaks[4] <= peaks[3]
    assert levels[0] < untouched[0]
    if wanted in (PLANS["each"], PLANS["tree"], PLANS["root"]):
        assert peaks[2] < 0.6 * most[2]


def test_a_tree_of_regions_holds_in_each_backward_what_it_holds_in_a_single_one() -> None:
    """Inputs that are handed down go with the regions that they were for, the graph kept or not."""
    _, peaks = levels_of(chain(8), plan(halves("blocks", 0, 7)))
    model, x = chain(8)(), wide()
    enforce(model, x, plan(halves("blocks", 0, 7)), check=False)
    with no_collection(), Live(x, *model.parameters()) as live:
        output = model(x)
        live.peak = live.level
        output.backward(torch.ones_like(output))
    assert peaks[1] <= live.peak + x.numel() * 4


class Heads(nn.Module):
    """Two heads on one block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()
        self.heads = nn.ModuleList([Residual() for _ in range(2)])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.block(x)
        return [head(x) for head in self.heads]


@pytest.mark.parametrize("wanted", [plan(region("", None, region("block"))), everything])
def test_what_a_backward_does_not_take_goes_with_it(wanted: Any) -> None:
    model, x = Heads(), wide()
    enforce(model, x, wanted, check=False)
    bias = model.get_parameter("heads.1.linear.bias")
    with no_collection(), Live(x, *model.parameters()) as live:
        a, b = model(x)
        level = live.level
        torch.autograd.grad(b.sum(), bias, retain_graph=True)
        assert live.level == level
        a.sum().backward(retain_graph=True)
        b.sum().backward()


class Twice(torch.autograd.Function):
    """Reads what it has saved more than once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, x.tanh())
        return x.tanh() * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        x = ctx.saved_tensors[0]
        t = ctx.saved_tensors[1]
        result: torch.Tensor = grad * (t + x * (1 - t * t) * ctx.saved_tensors[0] / x)
        return result


class UsesTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Twice.apply(self.linear(x).exp())  # type: ignore[no-untyped-call]
        return y.exp().reciprocal()


@pytest.mark.parametrize(
    "wanted", [plan("blocks.0", "blocks.1"), plan(halves("blocks", 0, 1)), everything]
)
def test_a_tensor_that_is_asked_for_twice_in_one_backward(wanted: Any) -> None:
    assert_exact(lambda: Chain(UsesTwice(), UsesTwice()), rows, wanted, run=thrice)


@some
def test_a_saved_tensor_that_is_looked_at_outside_of_a_backward(wanted: Any) -> None:
    def looks(model: nn.Module, call: Call) -> Any:
        output = model(*call.args)
        found, seen, todo = [], set(), [output.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            todo.extend(n for n, _ in node.next_functions)
            for name in ("_saved_self", "_saved_mat1", "_saved_input"):
                tensor = getattr(node, name, None)
                if isinstance(tensor, torch.Tensor):
                    found.append(tensor.detach().clone())
        scalar_loss(output).backward()
        return [output, *found]

    assert_exact(chain(4, 0.2), rows, wanted, run=looks)


@some
def test_a_backward_that_raises_can_be_made_again(wanted: Any) -> None:
    class Stop(Exception):
        pass

    def raises(model: nn.Module, call: Call) -> Any:
        output = model(*call.args)

        def stop(_: torch.Tensor) -> None:
            raise Stop

        handle = model.get_parameter("blocks.1.linear.weight").register_hook(stop)
        with pytest.raises(Stop):
            scalar_loss(output).backward(retain_graph=True)
        handle.remove()
        model.zero_grad()
        scalar_loss(output).backward(retain_graph=True)
        scalar_loss(output).backward()
        return output

    assert_exact(chain(4, 0.2), rows, wanted, run=raises)


@some
def test_a_backward_inside_a_backward(wanted: Any) -> None:
    def nested(model: nn.Module, call: Call) -> Any:
        output = model(*call.args)
        weight = model.get_parameter("blocks.0.linear.weight")
        inner: list[torch.Tensor] = []

        def again(_: torch.Tensor) -> None:
            with torch.enable_grad():
                total = output.cos().sum()
            inner.extend(torch.autograd.grad(total, weight, retain_graph=True))

        handle = model.get_parameter("blocks.2.linear.weight").register_hook(again)
        scalar_loss(output).backward(retain_graph=True)
        handle.remove()
        scalar_loss(output).backward()
        return [output, *inner]

    assert_exact(chain(4, 0.2), rows, wanted, run=nested)


@some
def test_weights_that_change_between_two_backwards_raise(wanted: Any) -> None:
    model = chain(4)()
    enforce(model, rows(), wanted)
    output = model(rows())
    output.sum().backward(retain_graph=True)
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            block.linear.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_pruned_replays_find_what_was_kept_in_every_backward() -> None:
    def make() -> nn.Module:
        return Chain(*(Captured() for _ in range(3)))

    def wanted(graph: Any) -> Any:
        return plan(
            *(
                region(f"blocks.{i}", saved=saving(graph, f"blocks.{i}", "aten.addmm"))
                for i in range(3)
            )
        )

    assert_exact(make, rows, wanted, run=thrice, prune=True)


def test_only_the_backward_that_asks_recomputes() -> None:
    model = seeded(chain(4, 0.2))()
    expected = outcome(seeded(chain(4, 0.2))(), rows(), thrice)
    enforce(model, rows(), PLANS["tree"])
    with watched() as seen:
        found = outcome(model, rows(), thrice)
    assert not differences(expected, found)
    # two steps of three passes: each of the four leaves, and the two inner regions and the root
    assert seen.replays == 2 * 3 * 7
