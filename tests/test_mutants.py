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

from actckpt.data.graph import Graph
from actckpt.interpreting import regions
from actckpt.rewriting import holders, node, patch, record, replay, rewrite, run
from actckpt.rewriting.modes import PruneMode
from actckpt.rewriting.program import Program
from actckpt.tracing.call import map_tensors
from tests import exact, test_retained_graphs
from tests.exact import plan
from tests.models.blocks import chain
from tests.mutant_scenarios import (
    TREE,
    TwoKept,
    a_head_is_left_out,
    argument_changed_before_backward,
    cache_of_hugging_face,
    captured_output_changed,
    captured_results_are_let_go,
    dropout_switched_on,
    evaluation_between_forward_and_backward,
    glue_that_changes_an_output,
    nothing_is_left,
    parameters_changed_before_backward,
    retained,
    routed_otherwise,
    saved_tensor_changed,
    saving_in_each,
    steps_of,
    three,
    without_weights,
)
from tests.test_replay_autocast import bf16, forward_inside
from tests.test_replay_buffers import NORMS, Counts, Normed, ReadsThenWrites, Reassigns
from tests.test_replay_random import Noisy, PythonNoise

Patch = pytest.MonkeyPatch


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
    mp.setattr(rewrite.Rewrite, "snapshots", lambda self, program: {})


def attributes_not_put_back(mp: Patch) -> None:
    mp.setattr(rewrite.Rewrite, "put_attributes", nothing)


def attributes_left_by_replays(mp: Patch) -> None:
    edit_program(mp, each_stage(touches=()))


def links_unchecked(mp: Patch) -> None:
    mp.setattr(run.Run, "_continues", lambda *a: True)
    source = record.Span.source

    def any_version(self: record.Span, tensor: torch.Tensor) -> Any:
        found = self.produced.get(id(tensor))
        return source(self, tensor) or (found[1:3] if found and found[0]() is tensor else None)

    mp.setattr(record.Span, "source", any_version)


def parameter_versions_unchecked(mp: Patch) -> None:
    mp.setattr(replay, "unread", lambda tensors, refusal: nullcontext())


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
    init = replay.Replay.__init__

    def later(self: Any, *args: Any) -> None:
        init(self, *args)
        self.number = 1

    mp.setattr(replay.Replay, "__init__", later)


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


def holders_keep_what_a_retained_graph_was_handed(mp: Patch) -> None:
    mp.setattr(holders, "keeps_graph", lambda: False)


def regions_released_in_their_first_backward(mp: Patch) -> None:
    mp.setattr(node, "keeps_graph", lambda: False)


def the_end_of_a_backward_unnoticed(mp: Patch) -> None:
    mp.setattr(node, "at_end", nothing)


def handed_inputs_stay_until_the_end(mp: Patch) -> None:
    mp.setattr(node.Node, "_is_through", lambda self, backward: False)


def handed_inputs_go_before_all_is_recomputed(mp: Patch) -> None:
    await_another = node.Node._await_another

    def early(self: Any, path: Any, asker: Any) -> None:
        await_another(self, path, asker)
        for n in path[1:]:
            n.released = True

    mp.setattr(node.Node, "_await_another", early)


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
    (holders_keep_what_a_retained_graph_was_handed, retained("each")),
    (regions_released_in_their_first_backward, retained("tree")),
    (the_end_of_a_backward_unnoticed, a_head_is_left_out),
    (
        handed_inputs_stay_until_the_end,
        test_retained_graphs.test_a_tree_of_regions_holds_in_each_backward_what_it_holds_in_a_single_one,
    ),
    (handed_inputs_go_before_all_is_recomputed, retained("tree")),
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
