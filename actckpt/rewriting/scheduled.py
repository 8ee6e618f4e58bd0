"""The forward pass of a model planned by operations: followed, its saves dropped or pinned."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from actckpt.errors import ReplayError
from actckpt.rewriting.ambient import generator_states, set_generator_states
from actckpt.rewriting.backward import at_end, backward_id, keeps_graph
from actckpt.rewriting.burst_pass import Pass
from actckpt.rewriting.bursting import Views, run_steps, view_of
from actckpt.rewriting.following import Following
from actckpt.rewriting.holders import Dropped, Generation, Kept, bits, verify
from actckpt.rewriting.planned_module import PlannedModule
from actckpt.rewriting.resaving import unpack
from actckpt.rewriting.rewrite import Rewrite
from actckpt.rewriting.schedule import BurstProgram, CallProgram, Capture, Schedule
from actckpt.rewriting.wires import is_laid_out
from actckpt.tracing.call import tensors
from actckpt.tracing.fake import is_tracing


class ScheduledRun:
    """One forward pass of one root, and what its backward still needs of it.

    Autograd's holders keep it alive; it knows them weakly.
    """

    def __init__(self, rewrite: Rewrite, schedule: Schedule) -> None:
        self.rewrite = rewrite
        self.schedule = schedule
        # of the next save, and of those beyond what is being done
        self.number, self.end = 0, len(schedule.saves)
        # whether the call being made has had one dropped or pinned, and has hooks; the last that
        # is looked at
        self._taken = self._hooked = False
        self._last = -1
        # calls of each module whose forward is patched
        self._entered: Counter[str] = Counter()
        self.pins: dict[int, tuple[int, Kept]] = {}
        self.states: dict[int, Any] = {}
        self.holders: list[list[weakref.ref[Dropped]]] = [[] for _ in schedule.bursts]
        # whether a backward has saved for a further one what it was handed
        self._resaved = False
        self.remaking: list[Any] = [None] * len(schedule.bursts)
        # backward passes: the last over this graph, and those after which another comes, by number
        # and generation
        self._last_pass = Pass(schedule)
        self._passes: dict[tuple[int, Generation], Pass] = {}
        # operations from here on were not followed, and are never run again
        self.limit: int | None = None
        self._readers = dict(schedule.readers)
        self._drawers = dict(schedule.drawers)

    # ---- forward

    def call(self, patched: PlannedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a patched forward: the root's followed, any other as it is."""
        if patched.path:
            return self._inner(patched, args, kwargs)
        # the first run is compared whole: it is the traced one where it need not be, too
        whole = self.rewrite.checking or is_tracing()
        following = Following(
            self.schedule,
            self.rewrite.learned(whole),
            whole,
            [*self.rewrite.resident_tensors(), *tensors((args, kwargs))],
            self._before_call,
            self._after_call,
            self._in_call,
            self._leave,
        )
        self._following = following
        self._hooks = saved_tensors_hooks(self._packer(), unpack)
        try:
            with self._hooks if self.schedule.outside else nullcontext(), following:
                out = patched.run(args, kwargs)
            following.finish()
        finally:
            del self._following, self._hooks
        return out

    def _inner(self, patched: PlannedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a module's forward where following may be taken up or left off."""
        path = patched.path
        number = self._entered[path]
        self._entered[path] = number + 1
        begin, end = self.schedule.turns.get((path, number), (None, None))
        following = self._following
        if not following.stretches:
            return patched.run(args, kwargs)
        following.turn(begin)
        out = patched.run(args, kwargs)
        following.turn(end)
        return out

    def _in_call(self, call: CallProgram, counted: bool, work: Callable[[], Any]) -> Any:
        """Does what a call does, with a look at what autograd saves meanwhile.

        Everywhere else autograd saves by itself, and so it does after the last one that is dropped
        or pinned where a run has counted before: a hook takes microseconds, in backward again.
        """
        if self.schedule.outside:
            return work()
        saves = call.saves
        assert saves is not None
        self.number, self.end, self._taken = saves.first, saves.last, False
        self._last = saves.wanted if counted else -1
        self._hooks.__enter__()
        self._hooked = True
        try:
            out = work()
        finally:
            if self._hooked:
                self._hooks.__exit__()
        if not counted and self.number != self.end:
            # the same call on the same tensors: gradients are wanted of others than in the trace
            if self._taken:
                raise ReplayError(
                    f"a call saved {self.number - saves.first} tensors for backward, not "
                    f"{saves.last - saves.first} as when it was planned for, and some are dropped. "
                    "Likely cause: requires_grad or no_grad differ from the step that was "
                    "planned. What works: actckpt.optimize(model, ...) again after such a change"
                )
            self._following.stop("it saves other tensors")
        return out

    def _packer(self) -> Any:
        """The pack hook. Autograd keeps it, which must not keep the run."""
        found = weakref.ref(self)

        def pack(tensor: torch.Tensor) -> Any:
            run = found()
            assert run is not None  # its forward is running
            if not torch._C._is_torch_function_mode_enabled():
                return run._pack(tensor)
            # a custom Function saves outside of any call, where ours would be followed
            with torch._C.DisableTorchFunction():
                return run._pack(tensor)

        return pack

    def _pack(self, tensor: torch.Tensor) -> Any:
        number = self.number
        self.number = number + 1
        if number == self._last:  # autograd saves the rest of the call's by itself
            self._hooks.__exit__()
            self._hooked = False
        if number < self.end:
            program = self.schedule.saves[number]
        else:
            program = None
            self._following.stop("it saves more tensors")
        if program is None or self.limit is not None:
            return Kept(tensor)
        if not is_laid_out(tensor, self.schedule.windows[program.value]):
            self._following.stop("it saves a tensor of another shape or dtype")
            self.limit = min(self.limit or program.at, program.at)
            return Kept(tensor)
        self._taken = True
        if program.storage >= 0:
            self.pins[program.storage] = (program.value, Kept(tensor))
        if program.burst < 0:
            return Kept(tensor)
        burst = self._remaking(program.burst)
        holder = Dropped(burst, program.value, tensor.shape, tensor.dtype)
        if self.rewrite.checking:
            holder.hash = bits(tensor)
        self.holders[program.burst].append(weakref.ref(holder))
        return holder

    def _before_call(self, number: int, call: CallProgram, given: list[torch.Tensor]) -> None:
        if call.draws:
            self.states[number] = generator_states(True, (), self.rewrite.device_type)
        for capture in call.captures:
            if not capture.result:
                self._pin(capture, given)

    def _after_call(self, call: CallProgram, made: list[torch.Tensor]) -> None:
        for capture in call.captures:
            if capture.result:
                self._pin(capture, made)

    def _pin(self, capture: Capture, found: list[torch.Tensor]) -> None:
        tensor = found[capture.leaf]
        if is_laid_out(tensor, self.schedule.windows[capture.value]):
            self.pins[capture.storage] = (capture.value, Kept(tensor))
        else:
            self._following.stop("a tensor is laid out otherwise")

    def _leave(self, position: int, reason: str) -> None:
        """The forward is not the traced one: everything is kept from here on."""
        calls = self.schedule.calls
        at = calls[position].first if position < len(calls) else calls[-1].first + (1 << 62)
        self.limit = at if self.limit is None else min(self.limit, at)
        self.rewrite.diverge(reason)

    # ---- backward

    def _remaking(self, burst: int) -> Remake:
        ref = self.remaking[burst]
        found: Remake | None = ref() if ref is not None else None
        if found is None:
            found = Remake(self, burst)
            self.remaking[burst] = weakref.ref(found)
        return found

    def lasts(self) -> bool:
        """Whether bursts can be run once more after the next time."""
        return not self._last_pass.done

    def recompute(self, index: int, asker: Dropped) -> None:
        """Runs a burst, after those that it takes something from, and fills its holders.

        Raises:
            ReplayError: it could not be run, or did not do again what had been done.
            RuntimeError: something that it reads was changed in place since.
        """
        generation = asker.generation
        if not (self.lasts() and (keeps_graph() or self._outlives(generation))):
            self._run(index, self._last_pass, asker)
            return
        now = (backward_id(), generation)
        found = self._passes.get(now)
        if now[0] < 0 or (found is not None and not found.awaits(index)):
            # nobody else is going to ask; or it was asked before, and may have been let go
            self._run(index, Pass(self.schedule, [index], keeps=True, alone=True), asker)
            return
        if found is None:
            asked = [n for n in range(len(self.holders)) if self._is_asked(n, generation)]
            found = self._passes[now] = Pass(self.schedule, asked, keeps=True)
            self._await_end(now)
        self._run(index, found, asker)

    def _alive(self, burst: int) -> Iterator[Dropped]:
        """Holders of a burst that autograd still has."""
        for ref in self.holders[burst]:
            holder = ref()
            if holder is not None:
                yield holder

    def _is_asked(self, burst: int, generation: Generation) -> bool:
        return any(h.generation == generation for h in self._alive(burst))

    def _outlives(self, generation: Generation) -> bool:
        """Whether others than of this generation are going to be asked for, too."""
        bursts = range(len(self.holders)) if self._resaved else ()
        return any(h.generation != generation for n in bursts for h in self._alive(n))

    def resaved(self, burst: int, holder: Dropped) -> None:
        """A backward has saved for a further one what it was handed."""
        self._resaved = True
        self.holders[burst].append(weakref.ref(holder))

    def _await_end(self, now: tuple[int, Generation]) -> None:
        """What a backward did not take goes when it has ended."""
        ref = weakref.ref(self)

        def ended() -> None:
            run = ref()
            if run is None:
                return
            del run._passes[now]
            if run.lasts():
                for burst in range(len(run.holders)):
                    alive = list(run._alive(burst))
                    run.holders[burst] = [weakref.ref(holder) for holder in alive]
                    for holder in alive:
                        holder.tensor = None

        at_end(ended)

    def _run(self, index: int, now: Pass, asker: Dropped) -> None:
        if index in now.done:
            return
        burst = self.schedule.bursts[index]
        for _, giver in burst.taken:
            self._run(giver, now, asker)
        now.done.add(index)
        found = self._inputs(burst, now)
        before = generator_states(bool(burst.draws), (), self.rewrite.device_type)
        try:
            run_steps(self.schedule, burst, found, self.states, self.limit, self.rewrite.decoded)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            raise Remake(self, index).error(f"{type(error).__name__}: {error}") from error
        finally:
            set_generator_states(before)
        self._fill(index, found, now, asker)
        if burst.hands:
            now.handed[index] = {sid: found[sid] for sid in burst.hands if sid in found}
        now.taken_by(burst)
        if not now.keeps:
            self._let_go(burst)

    def _inputs(self, burst: BurstProgram, now: Pass) -> dict[int, Views]:
        """What a burst begins with. A forward that left the trace did not come to all of it."""
        found: dict[int, Views] = {}
        for sid in burst.pins:
            if sid in self.pins:
                value, kept = self.pins[sid]
                kept.get()
                found[sid] = {value: kept.tensor}
        for sid, giver in burst.taken:
            if sid in now.handed[giver]:
                found[sid] = now.handed[giver][sid]
        return found

    def _fill(self, index: int, found: dict[int, Views], now: Pass, asker: Dropped) -> None:
        filled = []
        backward = backward_id()
        for holder in self._alive(index):
            if holder.tensor is not None:
                continue
            if (
                now.keeps
                and holder is not asker
                and (now.alone or holder.taken == backward or holder.generation != asker.generation)
            ):
                continue
            value = holder.number
            views = found.get(self.schedule.windows[value][0])
            if views is None:
                raise Remake(self, index).error("a saved tensor was not made again")
            holder.fill(view_of(views, value, self.schedule.windows))
            filled.append(holder)
        if not now.keeps:
            self.holders[index] = []
        verify(filled)

    def _let_go(self, burst: BurstProgram) -> None:
        """Releases what no burst reads any more."""
        for sid in burst.pins:
            self._readers[sid] -= 1
            if not self._readers[sid]:
                self.pins.pop(sid, None)
        for call in burst.draws:
            self._drawers[call] -= 1
            if not self._drawers[call]:
                self.states.pop(call, None)


class Remake:
    """One burst of one run, as autograd's holders know it."""

    __slots__ = ("__weakref__", "index", "run")

    def __init__(self, run: ScheduledRun, index: int) -> None:
        self.run = run
        self.index = index

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"the recomputation of {self.run.schedule.bursts[self.index].label}"

    def recompute(self, asker: Dropped) -> None:
        """Fills every holder of the burst."""
        self.run.recompute(self.index, asker)

    def resaved(self, holder: Dropped) -> None:
        """A backward has saved for a further one what it was handed."""
        self.run.resaved(self.index, holder)

    def lasts(self) -> bool:
        """Whether it can be run once more after the next time."""
        return self.run.lasts()

    def error(self, found: str) -> ReplayError:
        """The error for a recomputation that went astray."""
        return ReplayError(
            f"{self.label} failed: {found}.\n"
            "Operations run again on the tensors that they had must give the same. Likely causes: "
            "an operation that is not deterministic (try "
            "torch.use_deterministic_algorithms(True)), a setting of torch's that was changed "
            "between forward and backward.\n"
            "What works: actckpt.revert(model), or policy='selective'."
        )
