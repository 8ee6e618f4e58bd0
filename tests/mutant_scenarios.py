"""What an engine must get right: each scenario passes on it as it is, and fails on a mutant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.errors import ReplayError
from actckpt.rewriting import node
from tests import exact, test_retained_graphs
from tests.exact import assert_exact, enforce, halves, outcome, plan, region, saving, scalar_loss
from tests.models.blocks import WIDTH, Chain, Residual, chain, rows
from tests.suite import seeded
from tests.test_replay_memory import Captured, step_levels, wide
from tests.test_replay_versions import (
    ChangesWhatItGot,
    Illegal,
    saving_products,
)

TREE = plan(halves("blocks", 0, 2))
EACH = plan("blocks.0", "blocks.1", "blocks.2")
SPAN = plan(region("blocks.0", "blocks.2"))


def steps_of(make: exact.Make, wanted: Any = EACH, **more: Any) -> Callable[[], None]:
    return lambda: void(assert_exact(make, rows, wanted, check=False, **more))


def void(_: Any) -> None:
    pass


def three(kind: Callable[[], nn.Module]) -> exact.Make:
    return lambda: Chain(*(kind() for _ in range(3)))


def saving_in_each(*names: str) -> exact.MakePlan:
    def wanted(g: Graph) -> Plan:
        return plan(
            *(region(f"blocks.{i}", saved=saving(g, f"blocks.{i}", *names)) for i in range(3))
        )

    return wanted


class TwoKept(nn.Module):
    """Two results of one shape, both kept, read by what is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        a, b = y.exp(), y.tanh()
        return ((a - 2.0 * b).sin() * (b + 0.5).sigmoid()).cos()


def parameters_changed_before_backward() -> None:
    model = chain(3)()
    enforce(model, rows(), TREE, check=False)
    out = model(rows())
    with torch.no_grad():
        # autograd does not save a bias: only the region's own check can tell
        model.get_parameter("blocks.1.linear.bias").add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def argument_changed_before_backward() -> None:
    model = chain(3)()
    enforce(model, rows(), EACH, check=False)
    x = rows() * 1.0
    out = model(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def saved_tensor_changed() -> None:
    model = Chain(Residual(), Illegal())
    enforce(model, rows(), plan("blocks.1"), check=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scalar_loss(model(rows())).backward()


def glue_that_changes_an_output() -> None:
    from tests.test_replay_versions import Glue

    expected, planned = Glue(lambda x, y: y), Glue(lambda x, y: y)
    planned.load_state_dict(expected.state_dict())
    enforce(planned, rows(), SPAN, check=False)
    expected.change = planned.change = lambda x, y: y.mul_(1.5)
    assert not exact.differences(outcome(expected, rows()), outcome(planned, rows()))


def captured_output_changed() -> None:
    expected, planned = ChangesWhatItGot(changes=False), ChangesWhatItGot(changes=False)
    planned.load_state_dict(expected.state_dict())
    enforce(planned, rows(), saving_products("block"), prune=True, check=False)
    expected.changes = planned.changes = True
    assert not exact.differences(outcome(expected, rows()), outcome(planned, rows()))


def dropout_switched_on() -> None:
    make = seeded(chain(3, 0.0))
    expected, planned = make(), make()
    enforce(planned, rows(), TREE, check=False)
    for model in (expected, planned):
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.5
    assert not exact.differences(outcome(expected, rows()), outcome(planned, rows()))


def evaluation_between_forward_and_backward() -> None:
    def steps(model: nn.Module, call: Any) -> Any:
        output = model.train()(*call.args)
        model.eval()
        scalar_loss(output).backward()
        return output

    assert_exact(chain(3, 0.4), rows, EACH, run=steps, check=False)


def routed_otherwise() -> None:
    class Turns:
        count = 0

    class Routes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Turns.count += 1
            out: torch.Tensor = (self.linear(x) * Turns.count).sin().exp()
            return out

    model = Chain(Residual(), Routes())
    enforce(model, rows(), plan("blocks.1"), check=True)
    with pytest.raises(ReplayError):
        scalar_loss(model(rows())).backward()


def nothing_is_left() -> None:
    model = chain(3)()
    enforce(model, wide(), EACH, check=False)
    assert step_levels(model)[3] == 0


def captured_results_are_let_go() -> None:
    """Once a region has been recomputed for the last time, whoever still holds it."""
    nodes: list[Any] = []
    init = node.Node.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        nodes.append(self)

    model = three(Captured)()
    enforce(model, wide(), saving_in_each("aten.addmm"), prune=True, check=False)
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(node.Node, "__init__", noted)
        loss = scalar_loss(model(wide()))
        assert all(n.kept for n in nodes)
        loss.backward()
    assert nodes
    assert not any(n.kept for n in nodes)


def retained(name: str) -> Callable[[], None]:
    """Each of several backwards over one graph needs what the first did, and leaves nothing."""
    wanted = test_retained_graphs.PLANS[name]
    check = test_retained_graphs.test_each_backward_needs_as_much_as_the_first_and_leaves_nothing
    return lambda: check(wanted)


def a_head_is_left_out() -> None:
    test_retained_graphs.test_what_a_backward_does_not_take_goes_with_it(
        plan(region("", None, region("block")))
    )


def without_weights() -> nn.Module:
    """What its second block saves depends on whether its input requires gradients."""
    return Chain(Residual(), nn.Sequential(nn.Tanh(), nn.SiLU(), nn.Tanh()), Residual())


def cache_of_hugging_face() -> None:
    from tests.test_replay_caches import LAYERS, gpt2, ids
    from tests.test_replay_caches import run as cached

    wanted = plan(*(f"transformer.h.{i}" for i in range(LAYERS)))
    assert_exact(lambda: gpt2(0.0), ids, wanted, run=cached, check=False)
