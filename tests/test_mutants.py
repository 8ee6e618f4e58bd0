"""The engine broken on purpose: each fault must be caught by the check that is there for it.

A scenario passes on the engine as it is, and fails on the mutant. Bits are compared by the checker
alone, the engine's own comparison in the first step is off unless it is what is tested.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from actckpt import regions
from actckpt.errors import ReplayError
from actckpt.graph import Graph
from actckpt.plan import Plan
from actckpt.rewriting import holders, node, patch, record, replay, run
from actckpt.rewriting.modes import PruneMode
from actckpt.rewriting.program import Program
from actckpt.tracing.call import map_tensors
from tests import exact
from tests.exact import assert_exact, enforce, halves, outcome, plan, region, saving, scalar_loss
from tests.models.blocks import WIDTH, Chain, Residual, chain, rows
from tests.suite import seeded
from tests.test_replay_autocast import bf16, forward_inside
from tests.test_replay_buffers import NORMS, Counts, Normed, ReadsThenWrites, Reassigns
from tests.test_replay_memory import Captured, Live, no_collection, step_levels, wide
from tests.test_replay_random import Noisy, PythonNoise
from tests.test_replay_versions import (
    ChangesWhatItGot,
    Illegal,
    saving_products,
)

TREE = plan(halves("blocks", 0, 2))
EACH = plan("blocks.0", "blocks.1", "blocks.2")
SPAN = plan(region("blocks.0", "blocks.2"))
Patch = pytest.MonkeyPatch


# Scenarios


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
    """Once a region has been recomputed, even if the graph stays."""
    levels = []
    for planned in (False, True):
        model = three(Captured)()
        if planned:
            enforce(model, wide(), saving_in_each("aten.addmm"), prune=True, check=False)
        x = wide()
        with no_collection(), Live(x, *model.parameters()) as live:
            loss = scalar_loss(model(x))
            loss.backward(retain_graph=True)
            levels.append(live.level)
    assert levels[1] <= levels[0]


def without_weights() -> nn.Module:
    """What its second block saves depends on whether its input requires gradients."""
    return Chain(Residual(), nn.Sequential(nn.Tanh(), nn.SiLU(), nn.Tanh()), Residual())


def cache_of_hugging_face() -> None:
    from tests.test_replay_caches import LAYERS, gpt2, ids
    from tests.test_replay_caches import run as cached

    wanted = plan(*(f"transformer.h.{i}" for i in range(LAYERS)))
    assert_exact(lambda: gpt2(0.0), ids, wanted, run=cached, check=False)


# Mutants


def nothing(*_: Any, **__: Any) -> None:
    return None


def edit_program(mp: Patch, edit: Callable[[Program], Program]) -> None:
    compile_plan = exact.compile_plan
    mp.setattr(exact, "compile_plan", lambda *a, **k: edit(compile_plan(*a, **k)))


def each_stage(**changes: Any) -> Callable[[Program], Program]:
    return lambda p: dataclasses.replace(
        p, stages={k: dataclasses.replace(s, **changes) for k, s in p.stages.items()}
    )


def no_random_states(mp: Patch) -> None:
    mp.setattr(replay, "set_generator_states", nothing)


def random_states_moved_by_replays(mp: Patch) -> None:
    aside = replay._aside

    def moved(n: Any) -> Any:
        stack = aside(n)

        class Around:
            def __enter__(self) -> None:
                stack.__enter__()

            def __exit__(self, *error: Any) -> Any:
                done = stack.__exit__(*error)
                torch.rand(1)
                return done

        return Around()

    mp.setattr(replay, "_aside", moved)


def python_generators_forgotten(mp: Patch) -> None:
    edit_program(mp, each_stage(generators=()))


def draws_unnoticed(mp: Patch) -> None:
    mp.setattr(run.Run, "_note_draws", nothing)


def buffers_not_set_aside(mp: Patch) -> None:
    edit_program(mp, each_stage(buffers=()))


def buffers_not_snapshot(mp: Patch) -> None:
    mp.setattr(patch.Rewrite, "snapshots", lambda self, program: {})


def attributes_not_put_back(mp: Patch) -> None:
    mp.setattr(patch.Rewrite, "put_attributes", nothing)


def attributes_left_by_replays(mp: Patch) -> None:
    edit_program(mp, each_stage(touches=()))


def links_unchecked(mp: Patch) -> None:
    mp.setattr(run.Run, "_continues", lambda *a: True)
    source = node.Span.source

    def any_version(self: node.Span, tensor: torch.Tensor) -> Any:
        found = self.produced.get(id(tensor))
        return source(self, tensor) or (found[1:3] if found and found[0]() is tensor else None)

    mp.setattr(node.Span, "source", any_version)


def parameter_versions_unchecked(mp: Patch) -> None:
    mp.setattr(replay._Replay, "_check_versions", nothing)


def argument_versions_unchecked(mp: Patch) -> None:
    init = record.Held.__init__

    def no_version(self: Any, tensor: torch.Tensor) -> None:
        init(self, tensor)
        self.version = _Any()

    mp.setattr(record.Held, "__init__", no_version)
    mp.setattr(holders.Kept, "is_changed", lambda self: False)


class _Any:
    """Equal to every version."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def saved_versions_unchecked(mp: Patch) -> None:
    mp.setattr(holders.Dropped, "check", nothing)


def kept_versions_unchecked(mp: Patch) -> None:
    mp.setattr(holders.Kept, "is_changed", lambda self: False)


def kept_tensors_exchanged(mp: Patch) -> None:
    output = PruneMode._output

    def other(self: PruneMode, action: Any, n: int) -> torch.Tensor:
        keys = list(self.node.kept)
        if len(keys) > 1 and action.sources[n] is not None:
            a, b = keys[0], keys[1]
            kept = self.node.kept
            kept[a], kept[b] = kept[b], kept[a]
            try:
                return output(self, action, n)
            finally:
                kept[a], kept[b] = kept[b], kept[a]
        return output(self, action, n)

    mp.setattr(PruneMode, "_output", other)


def a_needed_operation_is_skipped(mp: Patch) -> None:
    needed = regions._needed

    def fewer(graph: Graph, dropped: Any, ops: Any, available: Any) -> frozenset[int]:
        found = needed(graph, dropped, ops, available)
        return found - {max((i for i in found if not graph.ops[i].random), default=-1)}

    mp.setattr(regions, "_needed", fewer)


def random_operations_are_skipped(mp: Patch) -> None:
    needed = regions._needed

    def fewer(graph: Graph, dropped: Any, ops: Any, available: Any) -> frozenset[int]:
        found = needed(graph, dropped, ops, available)
        draws = sorted(i for i in found if graph.ops[i].random)
        saved = {
            i
            for i in draws
            if all(graph.values[v].storage in available for v in graph.ops[i].outputs)
        }
        return found - saved

    mp.setattr(regions, "_needed", fewer)


def saves_counted_from_one(mp: Patch) -> None:
    init = replay._Replay.__init__

    def later(self: Any, *args: Any) -> None:
        init(self, *args)
        self.number = 1

    mp.setattr(replay._Replay, "__init__", later)


def autocast_not_brought_back(mp: Patch) -> None:
    mp.setattr(replay, "autocast_contexts", lambda recorded: [nullcontext()])


def training_flags_not_brought_back(mp: Patch) -> None:
    mp.setattr(patch.PatchedForward, "as_training", lambda self, flags: nullcontext())


def requires_grad_not_brought_back(mp: Patch) -> None:
    materialize = record.CallRecord.materialize

    def frozen(self: Any, available: Any) -> Any:
        def cut(t: torch.Tensor) -> torch.Tensor:
            return t.detach()

        return map_tensors(materialize(self, available), cut)

    mp.setattr(record.CallRecord, "materialize", frozen)


def bits_not_compared(mp: Patch) -> None:
    mp.setattr(holders, "bits", nothing)


def holders_held_by_their_region(mp: Patch) -> None:
    class Strong:
        ref = staticmethod(lambda x: lambda: x)
        ReferenceType = weakref.ReferenceType

    mp.setattr(node, "weakref", Strong)


def captured_results_never_let_go(mp: Patch) -> None:
    mp.setattr(node.Node, "filled", nothing)


def caches_shared_with_replays(mp: Patch) -> None:
    mp.setattr(record, "snapshot_caches", lambda tree: tree)


MUTANTS: list[tuple[Callable[[Patch], None], Callable[[], None]]] = [
    (no_random_states, steps_of(chain(3, 0.3))),
    (no_random_states, steps_of(chain(3, 0.3), TREE)),
    (random_states_moved_by_replays, steps_of(chain(3))),
    (python_generators_forgotten, steps_of(three(PythonNoise))),
    (draws_unnoticed, dropout_switched_on),
    (draws_unnoticed, glue_that_changes_an_output),
    (buffers_not_set_aside, steps_of(three(lambda: Normed(NORMS["batch norm"])))),
    (buffers_not_snapshot, steps_of(three(lambda: Normed(ReadsThenWrites)))),
    (attributes_not_put_back, steps_of(three(lambda: Normed(Counts)))),
    (attributes_not_put_back, steps_of(three(lambda: Normed(Reassigns)))),
    (attributes_left_by_replays, steps_of(three(lambda: Normed(Counts)))),
    (links_unchecked, glue_that_changes_an_output),
    (parameter_versions_unchecked, parameters_changed_before_backward),
    (argument_versions_unchecked, argument_changed_before_backward),
    (saved_versions_unchecked, saved_tensor_changed),
    (kept_versions_unchecked, captured_output_changed),
    (
        kept_tensors_exchanged,
        steps_of(three(TwoKept), saving_in_each("aten.exp", "aten.tanh"), prune=True),
    ),
    (
        a_needed_operation_is_skipped,
        steps_of(three(TwoKept), saving_in_each("aten.exp"), prune=True),
    ),
    (
        random_operations_are_skipped,
        steps_of(three(Noisy), saving_in_each("aten.rand_like", "aten.addmm"), prune=True),
    ),
    (saves_counted_from_one, steps_of(chain(3))),
    (autocast_not_brought_back, steps_of(chain(3), run=forward_inside, context=bf16)),
    (training_flags_not_brought_back, evaluation_between_forward_and_backward),
    (requires_grad_not_brought_back, steps_of(without_weights, plan("blocks.1"))),
    (bits_not_compared, routed_otherwise),
    (holders_held_by_their_region, nothing_is_left),
    (captured_results_never_let_go, captured_results_are_let_go),
    (caches_shared_with_replays, cache_of_hugging_face),
]


@pytest.mark.parametrize(
    ("mutate", "scenario"), MUTANTS, ids=[f"{n}-{m.__name__}" for n, (m, _) in enumerate(MUTANTS)]
)
def test_a_mutant_is_caught(
    mutate: Callable[[Patch], None], scenario: Callable[[], None], monkeypatch: Patch
) -> None:
    scenario()
    with monkeypatch.context() as mp:
        mutate(mp)
        with pytest.raises((AssertionError, RuntimeError, ValueError, pytest.fail.Exception)):
            scenario()
