"""What a region holds, and that nothing holds it afterwards: no cycles, no open runs, threads."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from actckpt.data.plan import Plan
from actckpt.rewriting.current import CURRENT
from tests.exact import differences, enforce, halves, outcome, plan, region, saving, scalar_loss
from tests.models.blocks import WIDTH, Chain, Residual, chain, rows
from tests.suite import seeded

PLANS: dict[str, Plan] = {
    "each": plan(*(f"blocks.{i}" for i in range(8))),
    "span": plan(region("blocks.0", "blocks.3"), region("blocks.4", "blocks.7")),
    "tree": plan(halves("blocks", 0, 7)),
    "root": plan(region("", None, halves("blocks", 0, 7))),
    "descend": plan(*(region(f"blocks.{i}", None, region(f"blocks.{i}.linear")) for i in range(8))),
}
plans = pytest.mark.parametrize("wanted", PLANS.values(), ids=PLANS.keys())


class Live(TorchDispatchMode):
    """Bytes of the storages made while it is active, and not in ``known``, that are alive."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive: dict[int, weakref.ref[Any]] = {}
        self.level = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(t, torch.Tensor):
                self._enter(t.untyped_storage())
        self.peak = max(self.peak, self.level)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.alive:
            return

        def gone(_: Any) -> None:
            del self.alive[key]
            self.level -= size

        self.alive[key] = weakref.ref(storage, gone)
        self.level += size


@contextmanager
def no_collection() -> Iterator[None]:
    """Memory comes back by reference counts alone, or not at all."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def wide() -> torch.Tensor:
    return rows(512)


def step_levels(model: nn.Module) -> list[int]:
    """Bytes alive after forward, backward, letting go of the output, and of the gradients."""
    x = wide()
    with no_collection(), Live(x, *model.parameters()) as live:
        out = model(x)
        levels = [live.level]
        loss = scalar_loss(out)
        loss.backward()
        levels.append(live.level)
        del out, loss
        levels.append(live.level)
        model.zero_grad()
        levels.append(live.level)
    return [*levels, live.peak]


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """A process's first step under a mode imports things, whose frames hold tensors for a while."""
    step_levels(chain(1, 0.1)())


@plans
def test_nothing_stays_after_a_step(wanted: Plan) -> None:
    expected = step_levels(chain(8, 0.1)())
    model = chain(8, 0.1)()
    enforce(model, wide(), wanted)
    for _ in range(3):  # the first step compares bits and holds their sums
        found = step_levels(model)
        assert found[1:4] == expected[1:4]
        assert found[3] == 0


@plans
def test_a_planned_step_holds_less(wanted: Plan) -> None:
    expected = step_levels(chain(8, 0.1)())
    model = chain(8, 0.1)()
    enforce(model, wide(), wanted, check=False)
    found = step_levels(model)
    if wanted is not PLANS["descend"]:
        assert found[0] < 0.4 * expected[0]
    assert found[0] < expected[0]
    assert found[4] < expected[4]


def test_a_tree_holds_less_than_a_span_and_a_span_than_the_blocks() -> None:
    peaks = {}
    for name in ("each", "span", "tree"):
        model = chain(32)()
        wanted = {
            "each": plan(*(f"blocks.{i}" for i in range(32))),
            "span": plan(*(region(f"blocks.{8 * i}", f"blocks.{8 * i + 7}") for i in range(4))),
            "tree": plan(halves("blocks", 0, 15), halves("blocks", 16, 31)),
        }[name]
        enforce(model, wide(), wanted, check=False)
        peaks[name] = step_levels(model)[4]
    assert peaks["tree"] < peaks["span"] < peaks["each"]


@plans
def test_an_output_that_is_dropped_before_backward(wanted: Plan) -> None:
    model = chain(8, 0.1)()
    enforce(model, wide(), wanted)
    x = wide()
    with no_collection(), Live(x, *model.parameters()) as live:
        out = model(x)
        assert live.level
        del out
        assert live.level == 0


@plans
def test_part_of_a_backward_lets_go_of_its_regions(wanted: Plan) -> None:
    model = chain(8, 0.1)()
    enforce(model, wide(), wanted, check=False)
    last = model.get_parameter("blocks.7.linear.weight")
    x = wide()
    with no_collection(), Live(x, *model.parameters()) as live:
        out = model(x)
        grads = torch.autograd.grad(scalar_loss(out), [last])
        del out, grads
        assert live.level == 0


def test_inputs_go_when_their_region_is_done() -> None:
    """A region's input is held until its replay, and not until the end of backward."""
    model = chain(8)()
    enforce(model, wide(), PLANS["each"], check=False)
    levels: list[int] = []
    x = wide()
    with no_collection(), Live(x, *model.parameters()) as live:
        handles = [
            p.register_post_accumulate_grad_hook(lambda p: levels.append(live.level))
            for n, p in model.named_parameters()
            if n.endswith("norm.weight")
        ]
        scalar_loss(model(x)).backward()
        for h in handles:
            h.remove()
    assert levels == sorted(levels, reverse=True)


class Captured(nn.Module):
    """Autograd does not save its product; what follows needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (self.linear(x) + 1.0).exp().sin()
        return result


def test_captured_results_go_too() -> None:
    model = Chain(*(Captured() for _ in range(3)))
    enforce(
        model,
        wide(),
        lambda g: plan(region("blocks.1", saved=saving(g, "blocks.1", "aten.addmm"))),
        prune=True,
    )
    assert step_levels(model)[3] == 0
    x = wide()
    with no_collection(), Live(x, *model.parameters()) as live:
        out = model(x)
        del out
        assert live.level == 0


class Failure(Exception):
    pass


class Fails(nn.Module):
    fail = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fail:
            raise Failure
        return x.exp().sin()


@pytest.mark.parametrize(
    "wanted",
    [
        plan(*(f"blocks.{i}" for i in range(4))),
        plan(region("blocks.0", "blocks.3")),
        plan(region("", None, halves("blocks", 0, 3))),
        plan(region("blocks.0", "blocks.2", region("blocks.1", "blocks.2")), "blocks.3"),
    ],
)
def test_an_exception_in_mid_forward_drops_the_run(wanted: Plan) -> None:
    def make() -> Chain:
        return Chain(Residual(p=0.1), Residual(p=0.1), Fails(), Residual(p=0.1))

    def run(planned: bool) -> dict[str, torch.Tensor]:
        model = seeded(make)()
        failing = model.get_submodule("blocks.2")
        assert isinstance(failing, Fails)
        failing.fail = False
        if planned:
            enforce(model, wide(), wanted)
        failing.fail = True
        torch.manual_seed(3)
        x = wide()
        with no_collection(), Live(x, *model.parameters()) as live:
            with contextlib.suppress(Failure):
                model(x)
                raise AssertionError("it should have failed")
            assert live.level == 0
        assert CURRENT.run is None
        failing.fail = False
        return outcome(model, wide())

    assert not differences(run(False), run(True))


def test_an_exception_in_a_replay_leaves_the_model_usable() -> None:
    model = chain(3, 0.2)()
    enforce(model, rows(), plan(halves("blocks", 0, 2)))
    block = model.get_submodule("blocks.1")
    out = model(rows())

    def raises(*_: Any) -> None:
        raise KeyError("in a replay")

    handle = block.get_submodule("linear").register_forward_pre_hook(raises)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in a replay"):
        out.sum().backward()
    assert torch.equal(before, torch.get_rng_state())
    assert CURRENT.run is None
    handle.remove()
    del out
    model.zero_grad()
    expected = chain(3, 0.2)()
    expected.load_state_dict(model.state_dict())
    assert not differences(outcome(expected, rows()), outcome(model, rows()))


def test_threads_do_not_see_each_other() -> None:
    """Several threads train their own copies, and one model's forwards run side by side."""
    expected = chain(4)()
    planned = chain(4)()
    planned.load_state_dict(expected.state_dict())
    enforce(planned, rows(), plan(halves("blocks", 0, 3)))
    batches = [rows(n + 2) for n in range(4)]
    want = [
        torch.autograd.grad(scalar_loss(expected(b)), list(expected.parameters())) for b in batches
    ]
    found: dict[int, Any] = {}
    barrier = threading.Barrier(len(batches))

    def work(n: int) -> None:
        barrier.wait()
        for _ in range(5):
            out = planned(batches[n])
            barrier.wait()
            found[n] = torch.autograd.grad(scalar_loss(out), list(planned.parameters()))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(batches))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for n, grads in enumerate(want):
        assert all(torch.equal(a, b) for a, b in zip(grads, found[n], strict=True))


def test_backward_in_another_thread_than_forward() -> None:
    expected, planned = chain(4)(), chain(4)()
    planned.load_state_dict(expected.state_dict())
    enforce(planned, rows(), plan(halves("blocks", 0, 3)))
    for model in (expected, planned):
        loss = scalar_loss(model(rows()))
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    for a, b in zip(expected.parameters(), planned.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_a_model_that_is_deleted_is_freed() -> None:
    model = chain(4)()
    enforce(model, rows(), plan(halves("blocks", 0, 3)))
    scalar_loss(model(rows())).backward()
    ref = weakref.ref(model.get_submodule("blocks.1"))
    with no_collection():
        del model
        assert ref() is None
