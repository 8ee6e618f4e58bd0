"""The one checker of exactness: steps of a planned model against steps of the untouched one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan, Region, SavedOp
from actckpt.data.profile import Cost, Profile
from actckpt.rewriting import replay as replaying
from actckpt.rewriting.installing import install
from actckpt.rewriting.modes import PruneMode
from actckpt.rewriting.program import Program
from actckpt.rewriting.program import compile_plan as compile_plan  # test_mutants changes it
from actckpt.rewriting.pruning import Skipped
from actckpt.rewriting.rewrite import Rewrite
from actckpt.tracing.call import Call, tensors
from actckpt.tracing.step import Step
from actckpt.tracing.tracer import trace_step
from tests.models.blocks import rows
from tests.suite import seeded

Make = Callable[[], nn.Module]
Body = Callable[[nn.Module, Call], Any]
MakePlan = Callable[[Graph], Plan]
Context = Callable[[], AbstractContextManager[Any]]
STEPS = 2


# Plans by hand


def region(
    first: str | tuple[str, int],
    last: str | tuple[str, int] | None = None,
    *inside: Region,
    saved: tuple[SavedOp, ...] = (),
) -> Region:
    """A region from stage ``first`` to ``last`` (by default the same); a bare path is call 0."""
    a = (first, 0) if isinstance(first, str) else first
    b = a if last is None else (last, 0) if isinstance(last, str) else last
    return Region(a, b, inside, saved)


def plan(*regions: Region | str) -> Plan:
    """A plan of these regions; a bare path is the region of its one stage."""
    return Plan("by hand", tuple(region(r) if isinstance(r, str) else r for r in regions))


def halves(prefix: str, first: int, last: int) -> Region:
    """The binary tree of regions over ``prefix.first`` … ``prefix.last``."""
    if first == last:
        return region(f"{prefix}.{first}")
    middle = (first + last) // 2
    return region(
        f"{prefix}.{first}",
        f"{prefix}.{last}",
        halves(prefix, first, middle),
        halves(prefix, middle + 1, last),
    )


def saving(graph: Graph, stage: str, *names: str) -> tuple[SavedOp, ...]:
    """Every operation of these names (without overload) inside the first call of a stage."""
    outer = graph.stages[graph.stage_ids[(stage, 0)]]
    counts: dict[tuple[int, str], int] = {}
    found = []
    for op in graph.ops[outer.first : outer.last]:
        nth = counts.get((op.stage, op.name), 0)
        counts[(op.stage, op.name)] = nth + 1
        if op.name.rpartition(".")[0] in names:
            owner = graph.stages[op.stage]
            found.append(SavedOp(owner.path, owner.call, op.name, nth))
    assert found, f"{stage} runs none of {names}"
    return tuple(found)


# Putting one in force


@dataclass(frozen=True, slots=True)
class InForce:
    """A model with a plan in force, the trace that it was made on, and its program."""

    model: nn.Module
    graph: Graph
    program: Program


def dear(graph: Graph) -> Profile:
    """A profile under which skipping any operation pays."""
    return Profile(graph.device, tuple(Cost(1.0) for _ in graph.signatures), dispatch_s=0.0)


def enforce(
    model: nn.Module,
    batch: Any,
    wanted: Plan | MakePlan,
    *,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    context: Context = nullcontext,
    prune: bool = False,
    must_prune: bool = True,
    check: bool = True,
) -> InForce:
    """Traces, compiles and installs a plan, with no profile measured and no dry run.

    Args:
        prune: skip what replays do not need, whatever it costs.
        check: compare the first step's recomputations bit by bit, as `optimize` does.
    """
    with context():
        graph = trace_step(model, Step(Call.of(batch), loss_fn or scalar_loss))
    made = wanted if isinstance(wanted, Plan) else wanted(graph)
    program = compile_plan(graph, made, dear(graph) if prune else None)
    if prune and must_prune:
        assert any(r.pruning is not None for r in program.regions), "nothing is pruned"
    install(Rewrite(model, program, check=check))
    return InForce(model, graph, program)


# One step


def scalar_loss(output: Any) -> torch.Tensor:
    """A scalar that depends on each element of each floating output, none with weight 1."""
    total = torch.zeros(())
    if hasattr(output, "loss") and output.loss is not None:
        loss: torch.Tensor = output.loss
        return loss
    for n, t in enumerate(tensors(output)):
        if t.requires_grad:
            weights = torch.linspace(0.5, 1.5, t.numel(), device=t.device).view_as(t)
            part = (t.float() * weights).square()
            total = total + (n + 1) * part.mean()
    return total


def body(model: nn.Module, call: Call) -> Any:
    """The usual step: forward, loss, backward."""
    output = model(*call.args, **call.kwargs)
    scalar_loss(output).backward()
    return output


@dataclass(slots=True)
class Seen:
    """What the engine did: replays of regions, and operations that they skipped."""

    replays: int = 0
    skipped: int = 0
    labels: list[str] = field(default_factory=list)


@contextmanager
def watched() -> Iterator[Seen]:
    """Counts replays while it is open."""
    seen = Seen()
    run, output = replaying.Replay.run, PruneMode._output

    def counted(self: Any) -> None:
        seen.replays += 1
        seen.labels.append(self.node.program.label)
        run(self)

    def skipped(self: PruneMode, action: Skipped, n: int) -> torch.Tensor:
        seen.skipped += 1
        return output(self, action, n)

    replaying.Replay.run = counted  # type: ignore[method-assign]
    PruneMode._output = skipped  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        replaying.Replay.run = run  # type: ignore[method-assign]
        PruneMode._output = output  # type: ignore[method-assign]


def seed_all(seed: int = 3) -> None:
    """Seeds torch's, Python's and NumPy's generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def outcome(
    model: nn.Module, batch: Any, run: Body = body, steps: int = STEPS, lr: float = 0.1
) -> dict[str, torch.Tensor]:
    """Everything that ``steps`` steps of plain SGD leave behind, named."""
    seed_all()
    found: dict[str, torch.Tensor] = {}
    call = Call.of(batch)

    def note(name: str, t: torch.Tensor | None) -> None:
        found[name] = torch.zeros(0) if t is None else t.detach().clone()

    for step in range(steps):
        output = run(model, call)
        for n, t in enumerate(tensors(output)):
            note(f"step {step} output {n}", t)
        for n, t in enumerate(tensors(call)):
            note(f"step {step} gradient of input {n}", t.grad)
            t.grad = None
        for name, p in model.named_parameters():
            note(f"step {step} gradient of {name}", p.grad)
            if p.grad is not None:
                with torch.no_grad():
                    p.sub_(p.grad.to_dense() if p.grad.is_sparse else p.grad, alpha=lr)
                p.grad = None
        for name, b in model.named_buffers():
            note(f"step {step} buffer {name}", b)
        note(f"step {step} torch random state", torch.get_rng_state())
        if torch.cuda.is_available():
            note(f"step {step} CUDA random state", torch.cuda.get_rng_state())
        state: Any = random.getstate()
        note(f"step {step} Python random state", torch.tensor(state[1]))
        state = np.random.get_state()
        note(f"step {step} NumPy random state", torch.tensor([*state[1].tolist(), state[2]]))
    for name, p in model.named_parameters():
        note(f"parameter {name}", p)
    return found


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is not bitwise equal in two outcomes."""
    names = [n for n in a if n not in b] + [n for n in b if n not in a]
    return names + [n for n in a if n in b and not same_bits(a[n], b[n])]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit (NaNs with the same bits are equal)."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.is_sparse:
        a, b = a.coalesce().to_dense(), b.coalesce().to_dense()
    return torch.equal(a, b) or torch.equal(_as_bits(a), _as_bits(b))


def _as_bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().flatten().view(torch.uint8) if t.numel() else t


def assert_exact(
    make: Make,
    batch: Callable[[], Any],
    wanted: Plan | MakePlan,
    *,
    run: Body = body,
    context: Context = nullcontext,
    prune: bool = False,
    steps: int = STEPS,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    must_replay: bool = True,
    check: bool = True,
) -> Seen:
    """Asserts that planned steps are bitwise those of the untouched model; returns what was seen.

    Args:
        make, batch: the model and its batch; called twice, seeded.
        run: one step up to its backward; returns what to compare besides gradients and states.
        context: opened around each forward and its loss where ``run`` does, and the trace.
        check: the engine's own comparison of bits in the first step.
        must_replay: a plan with regions must recompute one, and a pruned one skip an operation.
    """
    make = seeded(make)
    expected = outcome(make(), batch(), run, steps)
    planned = make()
    seed_all()
    before = (torch.get_rng_state(), random.getstate(), repr(np.random.get_state()))
    force = enforce(
        planned,
        batch(),
        wanted,
        loss_fn=loss_fn,
        context=context,
        prune=prune,
        must_prune=must_replay,
        check=check,
    )
    after = (torch.get_rng_state(), random.getstate(), repr(np.random.get_state()))
    assert torch.equal(before[0], after[0]), "tracing moved torch's generator"
    assert before[1:] == after[1:], "tracing moved Python's or NumPy's generator"
    with watched() as seen:
        found = outcome(planned, batch(), run, steps)
    different = differences(expected, found)
    assert not different, f"not bitwise equal: {different[:6]}"
    assert seen.replays or not force.program.regions or not must_replay, "nothing was recomputed"
    if prune and must_replay:
        assert seen.skipped, "no operation was skipped"
    return seen


# Forwards that become others


def changes(make: Make, wanted: MakePlan) -> bool:
    """Asserts that two steps as traced and one that is not are exact; whether it was noticed."""
    make = seeded(make)

    def run() -> Body:
        count = [0]

        def step(root: nn.Module, call: Any) -> Any:
            for module in root.modules():
                if count[0] == 2 and hasattr(type(module), "other"):
                    setattr(module, "other", True)  # noqa: B010
            count[0] += 1
            return body(root, call)

        return step

    expected = outcome(make(), rows(), run(), steps=3)
    model = make()
    enforce(model, rows(), wanted)
    found = outcome(model, rows(), run(), steps=3)
    assert not differences(expected, found)
    return bool(model.__dict__["forward"].rewrite.diverged)
