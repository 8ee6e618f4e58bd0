"""Buffers and attributes: they move once a step, and a replay finds them as the forward did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.plan import Plan
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
)
from tests.models.blocks import WIDTH, Chain, Residual, rows
from tests.suite import seeded


class Normed(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.linear(x)).tanh()
        return out + x


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "cumulative average": lambda: nn.BatchNorm1d(WIDTH, momentum=None),
    "no running statistics": lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
    "not affine": lambda: nn.BatchNorm1d(WIDTH, affine=False),
}
PLANS: dict[str, Plan] = {
    "each": plan("blocks.0", "blocks.1", "blocks.2"),
    "span": plan(region("blocks.0", "blocks.2")),
    "tree": plan(halves("blocks", 0, 2)),
    "descend": plan(region("blocks.1", None, region("blocks.1.norm"))),
    "root": plan(region("", None, region("blocks.0", "blocks.1", region("blocks.1")))),
    "norms alone": plan("blocks.0.norm", "blocks.2.norm"),
}
plans = pytest.mark.parametrize("wanted", PLANS.values(), ids=PLANS.keys())


@plans
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_batch_norm_moves_once(norm: Callable[[], nn.Module], wanted: Plan) -> None:
    assert_exact(lambda: Chain(*(Normed(norm) for _ in range(3))), rows, wanted)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("policy", ["auto", "calls", "sqrt"])
def test_planned_norms_over_three_steps(norm: Callable[[], nn.Module], policy: str) -> None:
    make = seeded(lambda: Chain(*(Normed(norm) for _ in range(6))))
    model, x = make(), rows(512)
    budget_gb = 0.7 * actckpt.measure(make(), x, loss_fn=scalar_loss).added_bytes / 1e9
    actckpt.optimize(
        model, budget_gb, batch=x, loss_fn=scalar_loss, policy=policy, scope="activations"
    )
    assert not differences(outcome(make(), x, steps=3), outcome(model, x, steps=3))


class Counted(nn.Module):
    """A factor that a counter gives, by ``item``: no operation reads the buffer."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("steps", torch.tensor(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        return self.scaled(x, float(self.steps))

    def scaled(self, x: torch.Tensor, divisor: float) -> torch.Tensor:
        x.exp()  # a pruned replay leaves it out
        out: torch.Tensor = (self.linear(x) / divisor).tanh() + x
        return out


class Shared(Counted):
    """A factor that operations make anew and of which only a window is asked for its number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.stack([self.steps + 2, self.steps])
        return self.scaled(x, both[:1].item())


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("wanted", [PLANS["each"], PLANS["span"], PLANS["tree"]])
@pytest.mark.parametrize("kind", [Counted, Shared])
def test_numbers_that_the_forward_asks_for(
    kind: type[nn.Module], wanted: Plan, prune: bool
) -> None:
    assert_exact(
        lambda: Chain(*(kind() for _ in range(3))), rows, wanted, prune=prune, check=not prune
    )


def test_number_of_batches_after_two_steps() -> None:
    model = Chain(*(Normed(NORMS["batch norm"]) for _ in range(3)))
    enforce(model, rows(), PLANS["tree"])
    outcome(model, rows(), steps=2)
    assert [int(b) for n, b in model.named_buffers() if n.endswith("tracked")] == [2, 2, 2]


def test_batch_norm_with_its_product_saved() -> None:
    for names in (("aten.addmm",), ("aten.native_batch_norm",), ("aten.addmm", "aten.tanh")):
        assert_exact(
            lambda: Chain(*(Normed(NORMS["batch norm"]) for _ in range(3))),
            rows,
            lambda g, names=names: plan(region("blocks.1", saved=saving(g, "blocks.1", *names))),  # type: ignore[misc]
            prune=names == ("aten.addmm",),
        )


def test_one_batch_norm_called_twice_in_a_step() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Normed(NORMS["batch norm"])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.block(self.block(x))
            return out

    for wanted in (
        plan(region(("block", 0)), region(("block", 1))),
        plan(region(("block", 0))),
        plan(region(("block", 0), ("block", 1))),
        plan(region("", None, region(("block", 1)))),
    ):
        assert_exact(Twice, rows, wanted)


def spectral_old() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))


def spectral_new() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))


def weight_norm() -> nn.Module:
    model: nn.Module = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    return model


@plans
@pytest.mark.filterwarnings("ignore:`torch.nn.utils")
@pytest.mark.parametrize("make", [spectral_new, weight_norm])
def test_parametrized_weights(make: Callable[[], nn.Module], wanted: Plan) -> None:
    """Spectral norm's power iteration reads its buffers before it writes them."""
    assert_exact(lambda: Chain(*(Normed(make) for _ in range(3))), rows, wanted)


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*")
@pytest.mark.parametrize("name", ["each", "span", "tree", "root"])
def test_spectral_norm_by_hooks(name: str) -> None:
    assert_exact(lambda: Chain(*(Normed(spectral_old) for _ in range(3))), rows, PLANS[name])


class ReadsThenWrites(nn.Module):
    """Subtracts a running mean, then moves it in place; counts its calls in another buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, calls = self.get_buffer("mean"), self.get_buffer("calls")
        y = self.linear(x) - mean
        calls += 1
        y = y.exp() / (1 + calls)
        mean.lerp_(y.detach().mean(0), 0.1)
        result: torch.Tensor = y.tanh()
        return result


class Reassigns(nn.Module):
    """Puts a new tensor in the buffer's place instead of writing into the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) - self.mean
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        result: torch.Tensor = (y.exp() * self.mean).tanh()
        return result


class Counts(nn.Module):
    """Its result depends on a Python number that it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.steps = 0
        self.seen: float | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        if self.seen is None:
            self.seen = 0.5
        self.seen = self.seen * 1.5
        out: torch.Tensor = (self.linear(x).exp() * self.seen).sin() / self.steps
        return out


@plans
@pytest.mark.parametrize("kind", [ReadsThenWrites, Reassigns, Counts])
def test_state_that_a_forward_reads_and_changes(kind: type[nn.Module], wanted: Plan) -> None:
    if wanted is PLANS["norms alone"]:
        wanted = plan("blocks.0.norm", "blocks.2.norm")
    assert_exact(lambda: Chain(*(Normed(kind) for _ in range(3))), rows, wanted)


def test_python_state_after_the_step_is_that_of_the_untouched_model() -> None:
    def counted(planned: bool) -> list[Any]:
        model = seeded(lambda: Chain(*(Normed(Counts) for _ in range(3))))()
        if planned:
            enforce(model, rows(), PLANS["tree"])
        outcome(model, rows())
        return [(m.steps, m.seen) for m in model.modules() if isinstance(m, Counts)]

    assert counted(False) == counted(True)


class Remembers(nn.Module):
    """Leaves its last activation behind, as people do to look at attention maps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x).tanh()
        self.last = y
        return y.exp()


def test_an_attribute_left_behind_is_that_of_the_forward() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Remembers() for _ in range(3)])

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            for block in self.blocks:
                x = block(x)
            return (
                x,
                *(b.last for b in self.blocks if isinstance(b, Remembers) and b.last is not None),
            )

    for name in ("each", "span", "tree"):
        assert_exact(Penalised, rows, PLANS[name])


def test_a_buffer_that_is_saved_and_moves_under_a_second_forward() -> None:
    """Two forwards before one backward: each replay must read its own forward's buffer."""

    def two(model: nn.Module, call: Any) -> Any:
        a, b = model(*call.args), model(call.args[0] * 0.5)
        (a.square().mean() + b.sin().mean()).backward()
        return [a, b]

    for kind in (ReadsThenWrites, Reassigns, Counts):
        for name in ("each", "tree"):
            assert_exact(
                lambda kind=kind: Chain(*(Normed(kind) for _ in range(3))),  # type: ignore[misc]
                rows,
                PLANS[name],
                run=two,
            )
    assert_exact(
        lambda: Chain(*(Normed(NORMS["batch norm"]) for _ in range(3))),
        rows,
        PLANS["tree"],
        run=two,
    )


def test_buffers_that_are_constants() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([1.0, 0.0] * (WIDTH // 2)))
            self.register_buffer("index", torch.arange(WIDTH).flip(0), persistent=False)
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.plain = torch.linspace(0, 1, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x * self.get_buffer("mask")).exp()[:, self.get_buffer("index")]
            result: torch.Tensor = y * self.plain + x
            return result

    for wanted in PLANS.values():
        if wanted is not PLANS["norms alone"] and wanted is not PLANS["descend"]:
            assert_exact(lambda: Chain(*(Masked() for _ in range(3))), rows, wanted)
    assert_exact(
        lambda: Chain(*(Masked() for _ in range(3))),
        rows,
        lambda g: plan(region("blocks.1", saved=saving(g, "blocks.1", "aten.exp"))),
        prune=True,
    )


def test_sparse_arguments_and_buffers() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("adjacency", (torch.eye(5) * 2).to_sparse())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.sparse.mm(
                self.get_buffer("adjacency"), self.linear(x).tanh()
            ).exp()
            return result

    def make() -> nn.Module:
        return Chain(Residual(), Graph(), Residual())

    assert_exact(make, rows, plan("blocks.0", "blocks.2"))
    assert_exact(make, rows, plan("blocks.1"))


def test_sparse_gradients() -> None:
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, WIDTH, sparse=True)
            self.block = Residual(p=0.1)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.block(self.embed(tokens))
            return out

    assert_exact(Embeds, lambda: torch.tensor([1, 2, 2, 5]), plan("embed", "block"))
    assert_exact(Embeds, lambda: torch.tensor([1, 2, 2, 5]), plan(region("embed", "block")))


def test_evaluation_between_steps_uses_the_statistics_of_the_forward() -> None:
    def run(planned: bool) -> dict[str, torch.Tensor]:
        model = seeded(lambda: Chain(*(Normed(NORMS["batch norm"]) for _ in range(3))))()
        if planned:
            enforce(model, rows(), PLANS["span"])
        first = outcome(model, rows(), steps=2)
        model.eval()
        with torch.no_grad():
            first["evaluated"] = model(rows())
        return {**first, **{f"eval {k}": t for k, t in outcome(model, rows(), steps=2).items()}}

    assert not differences(run(False), run(True))
