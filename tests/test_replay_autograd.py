"""What users do with autograd: several backwards, parts of graphs, hooks, custom functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from actckpt.data.plan import Plan
from actckpt.tracing.call import Call
from tests.exact import assert_exact, enforce, halves, plan, region, scalar_loss, watched
from tests.models.blocks import WIDTH, Chain, Residual, chain, rows
from tests.models.custom_function import CustomFunctionModel

PLANS: dict[str, Plan] = {
    "each": plan(*(f"blocks.{i}" for i in range(4))),
    "spans": plan(region("blocks.0", "blocks.1"), region("blocks.2", "blocks.3")),
    "tree": plan(halves("blocks", 0, 3)),
    "root": plan(region("", None, halves("blocks", 0, 3))),
    "descend": plan(region("blocks.1", None, region("blocks.1.linear")), "blocks.3"),
}
plans = pytest.mark.parametrize("wanted", PLANS.values(), ids=PLANS.keys())


def retain(model: nn.Module, call: Call) -> Any:
    output = model(*call.args)
    scalar_loss(output).backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    scalar_loss(output).backward()
    return [output, *first]


def second_order(model: nn.Module, call: Call) -> Any:
    output = model(*call.args)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(scalar_loss(output), parameters, create_graph=True)
    penalty = sum((g.square().sum() for g in grads), torch.zeros(()))
    penalty.backward()
    return [output, *grads]


def gradient_penalty(model: nn.Module, call: Call) -> Any:
    x = call.args[0].detach().requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    (scalar_loss(output) + slope.square().sum()).backward()
    return [output, slope]


def two_backwards(model: nn.Module, call: Call) -> Any:
    a, b = model(*call.args), model(call.args[0] * 0.5)
    scalar_loss(a).backward()
    scalar_loss(b).backward()
    return [a, b]


def interleaved(model: nn.Module, call: Call) -> Any:
    a = model(*call.args)
    b = model(a * 0.5)
    scalar_loss(b).backward()
    return [a, b]


def twice_in_one_loss(model: nn.Module, call: Call) -> Any:
    a, b = model(*call.args), model(call.args[0] + 1)
    (scalar_loss(a) * scalar_loss(b)).backward()
    return [a, b]


def part_of_the_rows(model: nn.Module, call: Call) -> Any:
    output = model(*call.args)
    output[:2].square().sum().backward(retain_graph=True)
    output[2:].sin().sum().backward()
    return output


def some_inputs(model: nn.Module, call: Call) -> Any:
    output = model(*call.args)
    names = dict(model.named_parameters())
    chosen = [names["blocks.3.linear.weight"], names["blocks.1.norm.bias"]]
    grads = torch.autograd.grad(scalar_loss(output), chosen, retain_graph=True)
    rest = torch.autograd.grad(scalar_loss(output), [names["blocks.0.linear.bias"]])
    return [output, *grads, *rest]


def abandoned(model: nn.Module, call: Call) -> Any:
    model(*call.args)
    output = model(*call.args)
    scalar_loss(output).backward()
    return output


def without_gradients_between(model: nn.Module, call: Call) -> Any:
    output = model(*call.args)
    with torch.no_grad():
        quiet = model(*call.args)
    with torch.inference_mode():
        model(*call.args)
    model.eval()
    evaluated = model(*call.args)
    model.train()
    (scalar_loss(output) + scalar_loss(evaluated)).backward()
    return [output, quiet, evaluated]


def anomaly(model: nn.Module, call: Call) -> Any:
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        output = model(*call.args)
        scalar_loss(output).backward()
    return output


RUNS: list[Callable[[nn.Module, Call], Any]] = [
    retain, second_order, gradient_penalty, two_backwards, interleaved, twice_in_one_loss,
    part_of_the_rows, some_inputs, abandoned, without_gradients_between,
]  # fmt: skip


@plans
@pytest.mark.parametrize("run", RUNS, ids=[f.__name__ for f in RUNS])
def test_backwards(run: Any, wanted: Plan) -> None:
    assert_exact(chain(4, 0.2), rows, wanted, run=run, steps=2)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode() -> None:
    assert_exact(chain(4, 0.2), rows, PLANS["tree"], run=anomaly)


@plans
def test_accumulation_over_two_micro_steps(wanted: Plan) -> None:
    def micro(model: nn.Module, call: Call) -> Any:
        outputs = []
        for shift in (0, 1):
            output = model(call.args[0].roll(shift, -1))
            (scalar_loss(output) / 2).backward()
            outputs.append(output)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return outputs

    assert_exact(chain(4, 0.2), rows, wanted, run=micro)


class Detaches(nn.Module):
    """Stop-gradients between and inside stages, and a stage under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(p=0.2) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.blocks[0](x)
        b = self.blocks[1](a.detach())
        with torch.no_grad():
            c = self.blocks[2](b)
        d: torch.Tensor = self.blocks[3](b + c)
        result: torch.Tensor = d + a
        return result


@pytest.mark.parametrize("wanted", [PLANS["each"], PLANS["root"], PLANS["descend"]])
def test_detach_and_no_grad_inside(wanted: Plan) -> None:
    if wanted is PLANS["root"]:
        wanted = plan(region("", None, region("blocks.0"), region("blocks.2")))
    assert_exact(Detaches, rows, wanted)


class EnablesGrad(nn.Module):
    """Computes under no_grad, and inside it with gradients again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.linear(x).exp()
            with torch.enable_grad():
                y = self.linear(x).tanh()
        result: torch.Tensor = y * scale
        return result


def test_gradients_switched_inside_a_stage() -> None:
    assert_exact(lambda: Chain(EnablesGrad(), EnablesGrad()), rows, plan("blocks.0", "blocks.1"))
    assert_exact(lambda: Chain(EnablesGrad(), EnablesGrad()), rows, plan(halves("blocks", 0, 1)))


def test_custom_functions_with_numbers_on_ctx() -> None:
    def batch() -> torch.Tensor:
        return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))

    def make() -> nn.Module:
        return CustomFunctionModel(depth=3, width=16, classes=4)

    for wanted in (
        plan("blocks.0", "blocks.1", "blocks.2"),
        plan(halves("blocks", 0, 2)),
        plan(region("", None, region("blocks.1"))),
    ):
        assert_exact(make, batch, wanted)


class KeepsOnCtx(torch.autograd.Function):
    """Saves a tensor, a number, a shape and a tensor kept as a plain attribute."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, power: int) -> torch.Tensor:
        ctx.save_for_backward(x, None, x.sigmoid())
        ctx.power, ctx.shape, ctx.plain = power, x.shape, x.detach().cos()
        return x.sigmoid() ** power

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, nothing, s = ctx.saved_tensors
        assert nothing is None
        assert x.shape == ctx.shape
        return grad * ctx.power * s**ctx.power * (1 - s) * ctx.plain / ctx.plain, None


def test_custom_function_that_saves_none_and_keeps_a_plain_tensor() -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = KeepsOnCtx.apply(self.linear(x), 3)  # type: ignore[no-untyped-call]
            return y.exp()

    for wanted in (plan("blocks.0", "blocks.1"), plan(halves("blocks", 0, 1))):
        assert_exact(lambda: Chain(Uses(), Uses()), rows, wanted)


@plans
def test_tensor_and_gradient_hooks_of_the_user(wanted: Plan) -> None:
    def hooked(model: nn.Module, call: Call) -> Any:
        seen: list[torch.Tensor] = []
        handles = [
            p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
            for p in model.parameters()
        ]
        inner = []

        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            output.register_hook(lambda g: g * 1.5)
            inner.append(output)
            return output * 1.0

        block = model.get_submodule("blocks.1")
        handles.append(block.register_forward_hook(keep))
        handles.append(
            block.register_full_backward_hook(lambda m, gi, go: seen.append(next(iter(go)).clone()))
        )
        output = model(*call.args)
        output.retain_grad()
        scalar_loss(output).backward()
        for handle in handles:
            handle.remove()
        assert len(inner) == 1
        return [output, output.grad, *seen]

    if wanted is PLANS["root"]:
        # a hook on a module inside a stage runs again when that is recomputed
        wanted = PLANS["each"]
    # the hook puts an operation between two stages: a region over both ends there
    assert_exact(chain(4, 0.2), rows, wanted, run=hooked)


def test_saved_tensor_hooks_of_the_user_around_the_model() -> None:
    def offload(model: nn.Module, call: Call) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            output = model(*call.args)
        scalar_loss(output).backward()
        return output

    assert_exact(chain(4, 0.2), rows, PLANS["tree"], run=offload)


def test_each_region_is_recomputed_once_in_each_backward() -> None:
    model = chain(4, 0.2)()
    enforce(model, rows(), PLANS["each"])
    with watched() as seen:
        out = model(rows())
        out.sum().backward(retain_graph=True)
        assert sorted(seen.labels) == [f"blocks.{i}" for i in range(4)]
        out.sum().backward()
        assert seen.replays == 8  # what was recomputed did not stay with the graph


def test_only_what_is_asked_for_is_recomputed() -> None:
    model = chain(4)()
    enforce(model, rows(), PLANS["each"])
    with watched() as seen:
        out = model(rows())
        torch.autograd.grad(out.sum(), [model.get_parameter("blocks.3.linear.weight")])
        assert seen.labels == ["blocks.3"]


def test_a_forward_in_another_grad_mode_runs_untouched() -> None:
    model = chain(4)()
    enforce(model, rows(), PLANS["tree"])
    with watched() as seen, torch.no_grad():
        assert not model(rows()).requires_grad
    assert not seen.replays
    with torch.inference_mode():
        model(rows())
    model.blocks[1](rows()).sum().backward()  # type: ignore[index, operator]


def test_hooks_on_modules_inside_a_stage_fire_again_and_on_the_stage_itself_once() -> None:
    """Documented: a recomputation calls the modules inside a stage, hooks and all."""
    model = chain(2)()
    enforce(model, rows(), plan("blocks.0"))
    fired: list[str] = []
    for path in ("blocks.0", "blocks.0.norm", "blocks.1.norm"):
        hook = fired.append
        model.get_submodule(path).register_forward_hook(
            lambda m, a, o, path=path, hook=hook: hook(path)
        )
    scalar_loss(model(rows())).backward()
    assert fired.count("blocks.0") == fired.count("blocks.1.norm") == 1
    assert fired.count("blocks.0.norm") == 2


class Tagged(torch.Tensor):
    """A tensor subclass that survives operations and carries no state of its own."""


def test_tensor_subclasses() -> None:
    def batch() -> torch.Tensor:
        return rows().as_subclass(Tagged)

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = 2.0 if type(x) is Tagged else 1.0
            out: torch.Tensor = (self.linear(x) * scale).tanh().exp()
            return out

    for wanted in (plan("blocks.0", "blocks.1"), plan(halves("blocks", 0, 1))):
        assert_exact(lambda: Chain(Asks(), Asks()), batch, wanted)
