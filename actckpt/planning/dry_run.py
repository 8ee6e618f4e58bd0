"""One step of the rewritten model on fake tensors, under the live-storage meter."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from actckpt.data.brief import brief
from actckpt.data.graph import Category, Graph, Phase
from actckpt.data.profile import Cost, Profile
from actckpt.planning.optimizer_part import PartMemory, enter_states, optimizer_part
from actckpt.profiler import census
from actckpt.profiler.live import LiveMeter
from actckpt.profiler.lives import Life, Lives
from actckpt.rewriting.course import Course
from actckpt.rewriting.installing import in_force
from actckpt.rewriting.program import Program
from actckpt.rewriting.rewrite import Rewrite
from actckpt.tracing.call import tensors
from actckpt.tracing.fake import FakeWorld, faked
from actckpt.tracing.fake_steps import FakeSteps
from actckpt.tracing.mode import StepMode, flat_outputs
from actckpt.tracing.optimizing import held
from actckpt.tracing.step import Step, run_step

SCRATCH = "scratch inside kernels"


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a step was seen to allocate.

    Attributes:
        peak_bytes: highest level of the step, workspaces included.
        live_bytes: the same without workspaces: live storages alone.
        added_bytes: the highest level above parameters, buffers, optimizer state, batch, constants
            and the gradients that had arrived by then.
        categories: the split at the peak, without workspaces.
        added_scratch_bytes: what of ``added_bytes`` is an operation's workspace.
        timeline: level after each operation, its scratch under "workspace".
        times_s: predicted time at which each operation of the timeline begins.
        starts: phase -> how many operations of the timeline had run when it began.
        diverged: why the forward was not the traced one, "" if it was.
        nodes: how many nodes the forward added to autograd's graph.
        held: the split when the forward has ended.
        kept: the largest split when a backward has ended that keeps the graph for a further one:
            gradients that it gave to the caller are among the activations.
        lives: of every storage, by number of the operation in ``timeline``.
        course: what each operation of the timeline was: index in `Graph.ops` (-1: not known), its
            name, whether it was run again.
    """

    peak_bytes: int
    live_bytes: int
    added_bytes: int
    categories: dict[str, int]
    timeline: tuple[dict[str, int], ...]
    times_s: tuple[float, ...]
    starts: dict[str, int]
    diverged: str = ""
    added_scratch_bytes: int = 0
    nodes: int = 0
    held: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    lives: tuple[Life, ...] = ()
    course: tuple[tuple[int, str, bool], ...] = ()

    __repr__ = brief

    def split(self, scope: str) -> dict[str, int]:
        """What the peak that a scope bounds is made of: it adds up to that peak."""
        if scope == "step":
            parts = {**self.categories, SCRATCH: self.peak_bytes - sum(self.categories.values())}
        else:
            held = self.added_bytes - self.added_scratch_bytes
            parts = {str(Category.ACTIVATION): held, SCRATCH: self.added_scratch_bytes}
        return {name: size for name, size in parts.items() if size}


def dry_run(
    model: nn.Module,
    step: Step,
    graph: Graph,
    program: Program,
    profile: Profile | None = None,
) -> DryRun:
    """Runs one training step of ``model`` under ``program`` without memory or kernels.

    The model must carry no rewrite of its own, and is left exactly as it was.

    Args:
        graph: the trace of the same step: it says which parameters get gradients.
        profile: workspaces and times of the operations; None counts live storages only.
    """
    costs = {}
    if profile is not None:
        costs = dict(zip(graph.signatures, profile.costs, strict=True))
    part = optimizer_part(graph, step)
    if part is not None:
        step = replace(step, optimizers=())
    with faked(model, step) as (world, fake_step):
        rewrite = Rewrite(model, program, check=False, entries=(step.entry,))
        lives = Lives()
        device_type = torch.device(graph.device).type
        with (
            in_force(model, rewrite),
            LiveMeter(device_type, stand_in=step.stand_in, lives=lives) as live,
        ):
            meter = _Meter(world, live, costs, Course(graph, rewrite), lives)
            with torch.enable_grad(), world.mode, meter, ExitStack() as hooks:
                steps = FakeSteps(fake_step.optimizers, graph.device)
                _enter_residents(model, fake_step, steps, graph, live, hooks)
                if part is not None:
                    enter_states(graph, part, live)
                for t in world.attached:
                    live.register(t, Category.CONSTANT)
                meter.running = True
                finish = hooks.enter_context(steps.in_backward(steps.steady))
                run_step(
                    model,
                    fake_step,
                    enter=meter.enter,
                    returned=meter.returned,
                    kept=meter.keep,
                )
                finish()
                if after := steps.after_backward():
                    meter.enter(Phase.OPTIMIZER)
                    for number in after:
                        steps.steady(number)
                if part is not None:
                    meter.enter(Phase.OPTIMIZER)
                    meter.run_part(graph, part)
            return DryRun(
                peak_bytes=meter.peak_bytes,
                live_bytes=meter.live_bytes,
                added_bytes=meter.added_bytes,
                categories={str(k): v for k, v in meter.peak_levels.items()},
                timeline=tuple(meter.timeline),
                times_s=tuple(meter.times_s),
                starts=meter.starts,
                diverged=rewrite.diverged,
                added_scratch_bytes=meter.added_scratch_bytes,
                nodes=rewrite.nodes,
                held=meter.held,
                kept=meter.kept,
                lives=tuple(lives.found),
                course=tuple(meter.course),
            )


def _enter_residents(
    model: nn.Module,
    step: Step,
    steps: FakeSteps,
    graph: Graph,
    live: LiveMeter,
    hooks: ExitStack,
) -> None:
    """Counts what exists before the step begins, and says which gradients have arrived.

    Args:
        hooks: removes the parameters' hooks, which would keep them for good.
    """
    trained = {s.name for s in graph.storages if s.category is Category.GRADIENT and s.bytes}
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        live.register(p, Category.PARAMETER)
        if p.requires_grad:
            hooks.callback(p.register_post_accumulate_grad_hook(_Settle(live)).remove)
        p.grad = torch.empty_like(p) if name in trained else None
    for number, one in enumerate(steps.optimizers):
        steps.begin(number)  # creates the state that a steady step finds resident
        for t in held(one.optimizer, model.modules()):
            _enter(live, t, Category.OPTIMIZER)
    for p in parameters.values():
        if not step.accumulate:
            p.grad = None
        elif p.grad is not None:
            _enter(live, p.grad, Category.GRADIENT)
    for b in model.buffers():
        live.register(b, Category.BUFFER)
    for t in (*tensors(step.call), *tensors(step.target)):
        live.register(t, Category.BATCH)


def _enter(live: LiveMeter, tensor: torch.Tensor, category: Category) -> None:
    """Counts a tensor under a category, whatever it was taken for when it was made."""
    live.register(tensor, category)
    live.move(tensor, category)


class _Settle:
    """Hook: a gradient has arrived, and is none of the activations any more."""

    def __init__(self, live: LiveMeter) -> None:
        self.live = live

    def __call__(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.live.move(parameter.grad, Category.GRADIENT)


class _Meter(StepMode):
    """Registers what each operation returns, and notes the level with the operation's scratch."""

    def __init__(
        self,
        world: FakeWorld,
        live: LiveMeter,
        costs: dict[str, Cost],
        follow: Course,
        lives: Lives,
    ) -> None:
        super().__init__(world)
        self.running = False
        self.live = live
        self.costs = costs
        self.follow = follow
        self.lives = lives
        self.course: list[tuple[int, str, bool]] = []
        self.peak_bytes = self.live_bytes = self.added_bytes = self.added_scratch_bytes = 0
        self.peak_levels: dict[Category, int] = {}
        self.timeline: list[dict[str, int]] = []
        self.times_s: list[float] = []
        self.clock_s = 0.0
        self.starts: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        # storage -> bytes of the gradients that the caller was given, which keeps them
        self._returned: dict[int, int] = {}

    def enter(self, phase: Phase) -> None:
        self.starts[str(phase)] = len(self.timeline)
        if phase is Phase.LOSS:
            self.held = {str(k): v for k, v in self.live.levels.items() if v}

    def returned(self, gradient: torch.Tensor) -> None:
        """A backward has given the caller a gradient."""
        self.live.move(gradient, Category.GRADIENT)
        self._returned |= census.sizes([gradient])

    def keep(self) -> None:
        """A backward has ended, and a further one comes."""
        levels = {str(k): v for k, v in self.live.levels.items() if v}
        activation, gradient = str(Category.ACTIVATION), str(Category.GRADIENT)
        returned_bytes = sum(self._returned.values())
        levels[activation] = levels.get(activation, 0) + returned_bytes
        levels[gradient] = levels.get(gradient, 0) - returned_bytes
        before = (self.kept.get(activation, 0), sum(self.kept.values()))
        if (levels[activation], sum(levels.values())) > before:
            self.kept = levels

    def constant(self, fake: torch.Tensor) -> None:
        self.live.register(fake, Category.CONSTANT)

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        known = len(self.lives.found)
        for t in flat_outputs(out):
            self.live.register(t)
        if self.running:
            name = str(func)
            place = self.follow.at(name)
            self.course.append((place.op, name, place.again))
            for life in self.lives.found[known:]:
                life.op, life.name = place.op, name
                life.region, life.again = place.region, place.again
            self._count(self.costs.get(self.signature(func, args, kwargs)) if self.costs else None)

    def run_part(self, graph: Graph, part: range) -> None:
        """Counts operations of the trace as if they had run."""
        memory = PartMemory(graph, part, self.live)
        costs = [self.costs.get(signature) for signature in graph.signatures]
        for index in part:
            op, known = graph.ops[index], len(self.lives.found)
            memory.ran(index)
            self.course.append((index, op.name, False))
            for life in self.lives.found[known:]:
                life.op, life.name = index, op.name
            self._count(costs[op.signature])

    def _count(self, cost: Cost | None) -> None:
        self._note(cost.workspace_bytes if cost is not None else 0)
        self.times_s.append(self.clock_s)
        self.clock_s += cost.time_s if cost is not None else 0.0

    def _note(self, workspace: int) -> None:
        level = self.live.level_bytes
        self.live_bytes = max(self.live_bytes, level)
        if level + workspace > self.peak_bytes:
            self.peak_bytes = level + workspace
            self.peak_levels = dict(self.live.levels)
        added = self.live.levels[Category.ACTIVATION] + workspace
        if added > self.added_bytes:
            self.added_bytes, self.added_scratch_bytes = added, workspace
        levels = {str(k): v for k, v in self.live.levels.items() if v}
        self.timeline.append(levels | {"workspace": workspace} if workspace else levels)
        self.lives.now = len(self.timeline)
