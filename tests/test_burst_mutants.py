"""Recomputation by operations broken on purpose: a test of it must catch each fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from actckpt.errors import ReplayError
from actckpt.interpreting import recomputation, stretches
from actckpt.rewriting import bursting, following, holders, learned, schedule, scheduled, wires
from actckpt.tracing import calls
from tests import (
    test_burst_changes,
    test_bursts,
    test_retained_graphs,
    test_stretch_changes,
    test_stretches,
    test_windows,
)
from tests.burst_plans import each_alone, everything
from tests.exact import assert_exact, enforce, scalar_loss
from tests.models.blocks import chain, rows
from tests.mutant_scenarios import retained
from tests.suite import seeded

Patch = pytest.MonkeyPatch


def exact_on(kind: str, wanted: Any = everything) -> Callable[[], None]:
    def scenario() -> None:
        assert_exact(test_bursts.MAKES[kind], rows, wanted, check=False, must_replay=False)

    return scenario


def changes(kind: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: test_burst_changes.test_a_forward_that_changes_keeps_its_gradients(
        kind, name, value, everything
    )


def ignores_wires(mp: Patch) -> None:
    init = following.Following.__init__

    def without(self: Any, schedule: Any, *rest: Any) -> None:
        blind = (dataclasses.replace(c, sources=(-1,) * len(c.sources)) for c in schedule.calls)
        init(self, dataclasses.replace(schedule, calls=tuple(blind)), *rest)

    mp.setattr(following.Following, "__init__", without)


def ignores_values(mp: Patch) -> None:
    same = learned.same

    def loose(expected: Any, found: Any, wires: Any) -> bool:
        return isinstance(expected, float) or same(expected, found, wires)

    mp.setattr(learned, "same", loose)


def takes_none_for_a_dead_tensor(mp: Patch) -> None:
    is_made = learned.Learned.is_made

    def loose(self: Any, args: Any, kwargs: Any, wires: Any) -> bool:
        none = {n for n, wire in self.wired if args[n] is None and wires[wire]() is None}
        wired = tuple((n, wire) for n, wire in self.wired if n not in none)
        return is_made(dataclasses.replace(self, wired=wired), args, kwargs, wires)

    mp.setattr(learned.Learned, "is_made", loose)
    ignores_what_gradients_are_wanted_of(mp)  # which would see it, too


def ignores_autocast(mp: Patch) -> None:
    for module in (calls, following, learned):
        mp.setattr(module, "casting", lambda: "")
    mp.setattr(following, "_is_any_cast", lambda: False)
    fits = wires.is_laid_out

    def loose(tensor: torch.Tensor, window: Any) -> bool:
        return fits(tensor.to(window[4]), window)

    mp.setattr(scheduled, "is_laid_out", loose)


def trusts_unknown_origins(mp: Patch) -> None:
    mp.setattr(recomputation.Recomputation, "_blind_arguments", lambda self: {})


def ignores_attributes(mp: Patch) -> None:
    mp.setattr(calls, "_MAKERS", frozenset())
    trusts_unknown_origins(mp)


def counts_no_saves(mp: Patch) -> None:
    in_call = scheduled.ScheduledRun._in_call

    def trusting(self: Any, call: Any, _: bool, work: Any) -> Any:
        return in_call(self, call, True, work)

    mp.setattr(scheduled.ScheduledRun, "_in_call", trusting)


def ignores_what_gradients_are_wanted_of(mp: Patch) -> None:
    mp.setattr(learned.Learned, "wanted", lambda *_: [])


def moves_statistics(mp: Patch) -> None:
    decoded = bursting.decoded

    def whole(step: Any, windows: Any) -> Any:
        return decoded(dataclasses.replace(step, blank=()), windows)

    mp.setattr(bursting, "decoded", whole)
    mp.setattr(
        recomputation.Recomputation,
        "_read",
        lambda self, index: frozenset(
            self.graph.values[v].storage for v in self.graph.ops[index].inputs
        ),
    )


def leaves_the_generator_moved(mp: Patch) -> None:
    mp.setattr(scheduled, "set_generator_states", lambda states: None)


def draws_anew(mp: Patch) -> None:
    mp.setattr(bursting, "set_generator_states", lambda states: None)


def forgets_where_a_window_lies(mp: Patch) -> None:
    def fixed(views: Any, value: int, windows: Any) -> torch.Tensor:
        found = views.get(value)
        if found is not None:
            return found  # type: ignore[no-any-return]
        base = next(iter(views.values()))
        _, shape, stride, offset = windows[value]
        return base.as_strided(shape, stride, offset)  # type: ignore[no-any-return]

    mp.setattr(bursting, "view_of", fixed)
    mp.setattr(scheduled, "view_of", fixed)


def forgets_versions(mp: Patch) -> None:
    mp.setattr(holders.Kept, "is_changed", lambda self: False)


def runs_beyond_the_limit(mp: Patch) -> None:
    run_steps = bursting.run_steps

    def whole(s: Any, burst: Any, found: Any, states: Any, limit: Any, cache: Any) -> None:
        run_steps(s, burst, found, states, None, cache)

    mp.setattr(scheduled, "run_steps", whole)


def carries_nothing(mp: Patch) -> None:
    """What is changed in place between stretches goes unnoticed."""
    mp.setattr(stretches.Stretches, "_carried", lambda self, spans, placed: [()] * len(spans))


def follows_no_results(mp: Patch) -> None:
    mp.setattr(stretches.Stretches, "_touching", {})


def takes_any_place(mp: Patch) -> None:
    """Of a window it is asked what it is a view of, and not where it lies."""
    is_this = wires.ViewOf.is_this

    def anywhere(self: Any, found: torch.Tensor, known: Any) -> bool:
        other = dataclasses.replace(
            self, window=(*self.window[:3], found.storage_offset(), found.dtype)
        )
        return is_this(other, found, known)

    mp.setattr(wires.ViewOf, "is_this", anywhere)


def takes_any_root(mp: Patch) -> None:
    """Of a window it is asked where it lies, and not in what."""
    is_this = wires.ViewOf.is_this

    def of_anything(self: Any, found: torch.Tensor, known: Any) -> bool:
        return is_this(dataclasses.replace(self, root=0), found, [wires.nothing])

    mp.setattr(wires.ViewOf, "is_this", of_anything)


def carries_no_roots(mp: Patch) -> None:
    mp.setattr(schedule._Compiler, "_rooted", lambda _, stretch, roots: dataclasses.replace(
        stretch, passes=tuple(
            dataclasses.replace(p, carried=tuple(w for w in p.carried if w not in roots))
            for p in stretch.passes
        ), carried=tuple(w for w in stretch.carried if w not in roots)
    ))  # fmt: skip


def is_shown_under_any_mode(mp: Patch) -> None:
    mp.setattr(following, "_get_current_function_mode", lambda: None)


def skips_makers(mp: Patch) -> None:
    """Of a storage that is changed in place only the first maker is known."""
    init = recomputation.Recomputation.__init__

    def first_only(self: Any, graph: Any) -> None:
        init(self, graph)
        self.makers = {s: makers[:1] for s, makers in self.makers.items()}

    mp.setattr(recomputation.Recomputation, "__init__", first_only)


def keeps_pins(mp: Patch) -> None:
    mp.setattr(scheduled.ScheduledRun, "_let_go", lambda self, index: None)


def pins_let_go() -> None:
    """After its last burst a run holds nothing, though the graph is still there."""
    model = seeded(chain(3))()
    enforce(model, rows(), each_alone)
    runs: list[Any] = []
    init = scheduled.ScheduledRun.__init__

    def noted(self: Any, *args: Any) -> None:
        init(self, *args)
        runs.append(self)

    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(scheduled.ScheduledRun, "__init__", noted)
        scalar_loss(model(rows())).backward()
    assert runs
    assert not any(run.pins or run.states for run in runs)


def bursts_released_in_their_first_backward(mp: Patch) -> None:
    mp.setattr(scheduled, "keeps_graph", lambda: False)


def the_end_of_a_backward_unnoticed(mp: Patch) -> None:
    mp.setattr(scheduled, "at_end", lambda do: None)


def pins_released_in_every_backward(mp: Patch) -> None:
    run_one = scheduled.ScheduledRun._run

    def releases(self: Any, index: int, now: Any, asker: Any) -> None:
        run_one(self, index, now, asker)
        if now.keeps:
            self._let_go(self.schedule.bursts[index])

    mp.setattr(scheduled.ScheduledRun, "_run", releases)


MUTANTS: dict[str, tuple[Callable[[Patch], None], Callable[[], None]]] = {
    "ignores wires": (ignores_wires, changes(test_burst_changes.Crossed, "swap", True)),
    "ignores values": (ignores_values, changes(test_burst_changes.Scaled, "factor", 0.7)),
    "takes None for a dead tensor": (
        takes_none_for_a_dead_tensor,
        changes(test_burst_changes.Biased, "bias", False),
    ),
    "ignores autocast": (ignores_autocast, changes(test_burst_changes.Cast, "cast", False)),
    "trusts unknown origins": (
        trusts_unknown_origins,
        lambda: test_burst_changes.test_what_nothing_is_known_of_is_not_made_again(everything),
    ),
    "ignores attributes": (ignores_attributes, changes(test_burst_changes.Turned, "swap", True)),
    "counts no saves": (
        counts_no_saves,
        test_burst_changes.test_a_first_call_that_saves_another_tensor_than_was_dropped_is_refused,
    ),
    "ignores what gradients are wanted of": (
        ignores_what_gradients_are_wanted_of,
        lambda: test_burst_changes.test_a_call_that_saves_other_tensors_keeps_them(True),
    ),
    "moves statistics": (moves_statistics, exact_on("batchnorm")),
    "leaves the generator moved": (leaves_the_generator_moved, exact_on("dropout", each_alone)),
    "draws anew": (draws_anew, exact_on("draws")),
    "forgets where a window lies": (
        forgets_where_a_window_lies,
        test_bursts.test_a_batch_that_is_a_window_of_a_larger_tensor,
    ),
    "forgets versions": (
        forgets_versions,
        test_bursts.test_parameters_changed_before_backward_raise,
    ),
    "runs beyond the limit": (
        runs_beyond_the_limit,
        changes(test_burst_changes.Branches, "more", -1),
    ),
    "carries nothing": (
        carries_nothing,
        test_stretch_changes.test_a_result_that_is_changed_in_place_between_stretches_is_not_made_again,
    ),
    "follows no results": (
        follows_no_results,
        test_windows.test_what_autograd_knows_no_base_of_is_followed_to_what_was_made,
    ),
    "takes any place": (
        takes_any_place,
        test_stretch_changes.test_windows_of_a_result_are_followed_wherever_they_are_taken,
    ),
    "takes any root": (
        takes_any_root,
        test_windows.test_a_window_of_another_result_is_noticed,
    ),
    "carries no roots": (
        carries_no_roots,
        test_windows.test_a_result_that_is_changed_through_a_window_is_not_made_again,
    ),
    "is shown under any mode": (
        is_shown_under_any_mode,
        test_stretches.test_a_mode_that_was_not_there_before_is_noticed,
    ),
    "skips makers": (skips_makers, exact_on("in place", each_alone)),
    "keeps pins": (keeps_pins, pins_let_go),
    "released in the first backward": (
        bursts_released_in_their_first_backward,
        retained("a burst each"),
    ),
    "the end of a backward unnoticed": (
        the_end_of_a_backward_unnoticed,
        lambda: test_retained_graphs.test_what_a_backward_does_not_take_goes_with_it(everything),
    ),
    "pins released in every backward": (
        pins_released_in_every_backward,
        lambda: test_retained_graphs.test_bits(test_retained_graphs.thrice, each_alone),
    ),
}


@pytest.mark.parametrize(("break_it", "scenario"), MUTANTS.values(), ids=MUTANTS)
def test_mutant_is_caught(break_it: Callable[[Patch], None], scenario: Callable[[], None]) -> None:
    scenario()
    with pytest.MonkeyPatch.context() as mp:
        break_it(mp)
        with pytest.raises(
            (AssertionError, RuntimeError, ReplayError, pytest.fail.Exception, KeyError)
        ):
            scenario()
