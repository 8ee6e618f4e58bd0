"""Which batch keeps a plan, which gets another, and what a session learns from real steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.session.session import session_of
from tests.exact import differences, halves, outcome, plan, scalar_loss
from tests.models.blocks import Chain, Residual, chain, rows
from tests.suite import seeded

pytestmark = pytest.mark.usefixtures("flat_profile")


class Counting:
    """A policy that notes what it was asked."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []

    def __call__(self, graph: Graph, profile: Any, budget_bytes: int | None) -> Plan:
        self.graphs.append(graph)
        return plan(halves("blocks", 0, 2))

    @property
    def calls(self) -> int:
        return len(self.graphs)


def optimized(**more: Any) -> tuple[nn.Module, Counting]:
    model, policy = seeded(chain(3, 0.1))(), Counting()
    actckpt.optimize(model, None, policy=policy, **{"loss_fn": scalar_loss, **more})
    return model, policy


def train(
    model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer | None = None
) -> None:
    model.zero_grad()
    scalar_loss(model(x)).backward()
    if optimizer is not None:
        optimizer.step()


def test_planning_on_the_first_forward() -> None:
    model, policy = optimized()
    assert policy.calls == 0
    with torch.no_grad():
        model(rows())
    assert policy.calls == 0
    assert not differences(outcome(seeded(chain(3, 0.1))(), rows()), outcome(model, rows()))
    assert policy.calls == 1
    assert actckpt.report(model).plan.regions


def test_smaller_batches_keep_the_plan_and_larger_ones_do_not() -> None:
    model, policy = optimized(batch=rows(6))
    expected = seeded(chain(3, 0.1))()
    for count, calls in ((6, 1), (3, 1), (1, 1), (6, 1), (7, 2), (5, 2), (7, 2), (9, 3)):
        assert not differences(outcome(expected, rows(count)), outcome(model, rows(count)))
        assert policy.calls == calls


def test_a_longer_and_thinner_batch_gets_a_plan_of_its_own() -> None:
    def cube(a: int, b: int) -> torch.Tensor:
        return torch.randn(a, b, 8, generator=torch.Generator().manual_seed(1))

    model, policy = optimized(batch=cube(4, 3))
    for shape, calls in (((4, 3), 1), ((2, 5), 2), ((4, 3), 2), ((2, 4), 2), ((4, 5), 3)):
        train(model, cube(*shape))
        assert policy.calls == calls, shape


def test_plans_are_cached_and_one_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, policy = optimized(batch=rows(4))
    with caplog.at_level(logging.INFO, logger="actckpt"):
        train(model, rows(8))
        assert caplog.text.count("planning again") == 1
        caplog.clear()
        for count in (8, 4, 2, 8):
            train(model, rows(count))
        assert "planning again" not in caplog.text
    assert policy.calls == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.eval(),
        lambda m: m.get_submodule("blocks.1.drop").eval(),
        lambda m: m.get_parameter("blocks.0.norm.weight").requires_grad_(False),
        lambda m: m.double(),
    ],
    ids=["eval", "one module in eval", "a frozen parameter", "dtype"],
)
def test_changes_of_the_model_that_need_another_plan(change: Callable[[nn.Module], Any]) -> None:
    model, policy = optimized(batch=rows())
    train(model, rows())
    assert policy.calls == 1
    change(model)
    expected = seeded(chain(3, 0.1))()
    change(expected)
    x = rows().to(next(model.parameters()).dtype)
    model.load_state_dict(expected.state_dict())
    model.zero_grad()
    assert not differences(outcome(expected, x), outcome(model, x))
    assert policy.calls == 2


def test_autocast_and_the_batchs_requires_grad_need_another_plan() -> None:
    model, policy = optimized(batch=rows())
    with torch.autocast("cpu", torch.bfloat16):
        train(model, rows())
    assert policy.calls == 2
    train(model, rows(requires_grad=True))
    assert policy.calls == 3
    train(model, rows())
    with torch.autocast("cpu", torch.bfloat16):
        train(model, rows())
    assert policy.calls == 3


def test_structure_and_plain_arguments_need_another_plan() -> None:
    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Residual(p=0.1) for _ in range(3)])

        def forward(
            self, x: torch.Tensor, scale: float = 1.0, extra: dict[str, torch.Tensor] | None = None
        ) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x * scale + (extra["y"] if extra else 0.0)

    model, policy = Options(), Counting()
    actckpt.optimize(model, None, policy=policy, batch=rows(), loss_fn=scalar_loss)
    for arguments, calls in (
        ({}, 1),
        ({"scale": 2.0}, 2),
        ({"extra": {"y": rows()}}, 3),
        ({"scale": 2.0}, 3),
    ):
        scalar_loss(model(rows(), **arguments)).backward()
        model.zero_grad()
        assert policy.calls == calls


def test_gradients_that_are_resident_unexpectedly() -> None:
    model, policy = optimized(batch=rows())
    train(model, rows())
    scalar_loss(model(rows())).backward()  # a second micro-step
    assert policy.calls == 2
    assert policy.graphs[1].resident_gradients
    assert not policy.graphs[0].resident_gradients
    model.zero_grad()
    train(model, rows())
    scalar_loss(model(rows())).backward()
    assert policy.calls == 2


def test_accumulate_plans_for_resident_gradients_at_once() -> None:
    model, policy = optimized(batch=rows(), accumulate=True)
    for _ in range(3):
        scalar_loss(model(rows())).backward()
    assert policy.calls == 1
    assert policy.graphs[0].resident_gradients


def test_an_optimizer_made_later_is_learned_from_its_first_step() -> None:
    model, policy = optimized(batch=rows())
    other = nn.Linear(2, 2)
    foreign = torch.optim.Adam(other.parameters())
    other(torch.ones(1, 2)).sum().backward()
    foreign.step()
    train(model, rows())
    assert policy.calls == 1
    optimizer = torch.optim.Adam(model.parameters())
    train(model, rows(), optimizer)
    assert policy.calls == 1
    train(model, rows(), optimizer)
    assert policy.calls == 2
    assert policy.graphs[1].optimizer_seen
    assert not policy.graphs[0].optimizer_seen
    train(model, rows(), optimizer)
    assert policy.calls == 2


def test_a_model_whose_forward_is_not_what_the_loop_calls_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = seeded(chain(3, 0.1))()
    actckpt.optimize(model, 1.0)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        scalar_loss(model.get_submodule("blocks.1")(rows())).backward()
        optimizer.step()
    said = [r.message for r in caplog.records if "nothing is planned" in r.message]
    assert len(said) == 1
    assert "forward of the Chain was never called" in said[0]


def test_several_models_learn_their_optimizers() -> None:
    """One model's results go into the other's, as in adversarial training."""

    def run(planned: bool) -> dict[str, torch.Tensor]:
        first, second = seeded(chain(3, 0.1))(), seeded(chain(4, 0.1))()
        for model in (first, second) if planned else ():
            actckpt.optimize(model, None, policy="full")
        optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (first, second)]
        torch.manual_seed(3)
        for count in (4, 4, 6):
            made = first(rows(count))
            scalar_loss(second(made.detach())).backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
            scalar_loss(second(made)).backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
        if planned:
            assert all("optimizer was seen" not in " ".join(actckpt.report(m).notes)
                       for m in (first, second))  # fmt: skip
        models = nn.ModuleList([first, second])
        return {n: p.detach().clone() for n, p in models.named_parameters()}

    assert not differences(run(False), run(True))


def test_an_optimizer_that_runs_the_model_is_no_part_of_a_step() -> None:
    def run(planned: bool) -> dict[str, torch.Tensor]:
        model = seeded(chain(3))()
        if planned:
            actckpt.optimize(model, None, policy="full", loss_fn=scalar_loss)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = scalar_loss(model(rows()))
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    assert not differences(run(False), run(True))
    model = seeded(chain(3))()
    with pytest.raises(actckpt.PlanError, match=r"LBFGS\.step needs a closure"):
        actckpt.optimize(
            model, None, batch=rows(), loss_fn=scalar_loss, policy="full",
            optimizer=torch.optim.LBFGS(model.parameters()),
        )  # fmt: skip
    assert "forward" not in model.__dict__


def test_an_optimizer_that_was_given_counts_before_its_first_step() -> None:
    model = seeded(chain(3, 0.1))()
    optimizer = torch.optim.Adam(model.parameters())
    policy = Counting()
    actckpt.optimize(
        model, None, policy=policy, batch=rows(), loss_fn=scalar_loss, optimizer=optimizer
    )
    assert policy.graphs[0].optimizer_seen
    assert not optimizer.state
    for _ in range(3):
        train(model, rows(), optimizer)
    assert policy.calls == 1


def test_training_with_a_learned_optimizer_is_exact() -> None:
    def run(planned: bool) -> dict[str, torch.Tensor]:
        model = seeded(chain(3, 0.1))()
        if planned:
            actckpt.optimize(model, None, policy=Counting(), loss_fn=scalar_loss)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        torch.manual_seed(3)
        for count in (4, 4, 2, 6, 4):
            optimizer.zero_grad()
            scalar_loss(model(rows(count))).backward()
            optimizer.step()
            scheduler.step()
        found = {n: p.detach().clone() for n, p in model.named_parameters()}
        state = [t for s in optimizer.state.values() for t in s.values()]
        return {**found, **{f"state {i}": t for i, t in enumerate(state)},
                "random": torch.get_rng_state()}  # fmt: skip

    assert not differences(run(False), run(True))


def test_optimizing_again_replaces_the_plan() -> None:
    model, first = optimized(batch=rows())
    second = Counting()
    actckpt.optimize(model, None, policy=second, batch=rows(), loss_fn=scalar_loss)
    train(model, rows(9))
    assert (first.calls, second.calls) == (1, 2)
    actckpt.optimize(model, None, policy="none", batch=rows(), loss_fn=scalar_loss)
    assert not actckpt.report(model).plan.regions
    actckpt.revert(model)
    assert session_of(model) is None
    train(model, rows(20))
    assert (first.calls, second.calls) == (1, 2)


def test_if_the_untouched_model_fits_nothing_is_touched() -> None:
    model = seeded(chain(3, 0.1))()
    actckpt.optimize(model, 10.0, batch=rows(), loss_fn=scalar_loss)
    assert not actckpt.report(model).plan.regions
    assert [p for p, m in model.named_modules() if "forward" in m.__dict__] == [""]


@pytest.mark.parametrize("policy", ["auto", "calls"])
def test_the_untouched_model_fits_to_the_last_of_the_budget(policy: str) -> None:
    make = seeded(lambda: nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()),) * 8))
    batch = torch.randn(4096, 64)
    whole = actckpt.measure(make(), batch, loss_fn=scalar_loss).peak_bytes
    for budget_bytes, untouched in ((1.0005 * whole, True), (0.999 * whole, False)):
        model = make()
        actckpt.optimize(model, budget_bytes / 1e9, batch=batch, loss_fn=scalar_loss, policy=policy)
        plan = actckpt.report(model).plan
        assert (not plan.regions and not plan.bursts) is untouched
        measured = actckpt.measure(model, batch, loss_fn=scalar_loss).peak_bytes
        assert measured <= budget_bytes


def test_a_batch_in_another_memory_order() -> None:
    """Channels last has the same shapes: what was kept lies otherwise."""

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = (self.conv(x) + 1.0).exp().sin()
            return result

    from tests.exact import enforce, region, saving

    def images() -> torch.Tensor:
        return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    make = seeded(lambda: Chain(Conv(), Conv()))
    for names in (("aten.convolution",), ("aten.exp",)):
        expected, model = make(), make()
        enforce(
            model,
            images(),
            lambda g, names=names: plan(region("blocks.1", saved=saving(g, "blocks.1", *names))),  # type: ignore[misc]
            prune=names == ("aten.convolution",),
        )
        outcome(model, images(), steps=1)
        outcome(expected, images(), steps=1)
        last = images().contiguous(memory_format=torch.channels_last)
        assert not differences(outcome(expected, last), outcome(model, last))


def test_a_smaller_batch_under_a_pruned_plan() -> None:
    """Tables are looked up by their weight, whose shape says nothing about the batch."""
    from tests.exact import enforce, region, saving

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 8)
            self.block = Residual()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = (self.table(tokens) + 1.0).exp()
            out: torch.Tensor = self.block(x * x.sin())
            return out

    make = seeded(Looks)
    expected, model = make(), make()
    many, few = torch.arange(28).view(7, 4) % 7, torch.arange(6).view(2, 3)
    enforce(
        model,
        many,
        lambda g: plan(region("", saved=saving(g, "", "aten.embedding", "aten.sin"))),
        prune=True,
    )
    for tokens in (many, few, many):
        assert not differences(outcome(expected, tokens), outcome(model, tokens))
