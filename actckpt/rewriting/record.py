"""One stage call as recorded: everything needed to make it again, and as little memory as that."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from actckpt.rewriting.ambient import autocast_state, generator_states
from actckpt.rewriting.holders import CHANGED
from actckpt.rewriting.planned_module import PlannedModule
from actckpt.rewriting.program import StageProgram
from actckpt.tracing.call import map_tensors
from actckpt.tracing.opaque import snapshot_caches

Link = tuple[int, int]


class Span:
    """The recorded calls of a chain of sibling stages, shared by every region that spans some.

    ``calls[i]`` is None while only an enclosing region's replay could provide the arguments.
    ``moved`` are the calls that were seen to move torch's generators, ``draws`` those of them that
    did not find the generators where the call before left them.
    """

    __slots__ = ("calls", "draws", "last_use", "moved", "pending", "produced")

    def __init__(self) -> None:
        self.calls: list[CallRecord | None] = []
        self.last_use: dict[Link, int] = {}
        self.produced: dict[int, tuple[Any, int, int, int]] = {}
        self.pending = 0
        self.moved: set[int] = set()
        self.draws: set[int] = set()

    def source(self, tensor: torch.Tensor) -> Link | None:
        """Which output of which call ``tensor`` is: the same object at the same version."""
        found = self.produced.get(id(tensor))
        if found is None or found[0]() is not tensor or found[3] != tensor._version:
            return None
        return found[1], found[2]

    def enter_outputs(self, position: int, outputs: list[torch.Tensor]) -> None:
        """Remembers (weakly) what call ``position`` returned."""
        for leaf, t in enumerate(outputs):
            self.produced[id(t)] = (weakref.ref(t), position, leaf, t._version)


class Held:
    """A tensor argument from outside the region."""

    __slots__ = ("requires_grad", "tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor.detach()
        self.version = tensor._version
        self.requires_grad = tensor.requires_grad


class Linked:
    """A tensor argument that is what an earlier call of the span returned."""

    __slots__ = ("link", "requires_grad")

    def __init__(self, link: Link, requires_grad: bool) -> None:
        self.link = link
        self.requires_grad = requires_grad


class CallRecord:
    """One call of a stage, in a span."""

    __slots__ = (
        "arguments", "attributes", "autocast", "buffers", "cached", "calls", "grad", "patched",
        "program", "random", "subclasses", "training", "versions",
    )  # fmt: skip

    def __init__(
        self,
        program: StageProgram,
        patched: PlannedModule,
        span: Span,
        position: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        calls: dict[str, int],
    ) -> None:
        self.program = program
        self.patched = patched
        self.grad = torch.is_grad_enabled()
        self.autocast = autocast_state(patched.device_type)
        self.cached = patched.cached()
        self.calls = {path: calls[path] for path in program.inner}
        self.random = generator_states(
            program.random or position in span.draws, program.generators, patched.device_type
        )
        self.versions = patched.watched(program)
        self.training = patched.training()
        # the backward of a tensor subclass runs without it, and a replay must not
        self.subclasses = torch._C._is_torch_function_enabled()
        self.attributes = patched.rewrite.attributes(program)
        self.buffers = patched.rewrite.snapshots(program)
        held: dict[int, Held | Linked] = {}

        def specify(t: torch.Tensor) -> Any:
            spec = held.get(id(t))
            if spec is None:
                link = span.source(t)
                if link is None or link[0] >= position:
                    spec = Held(t)
                else:
                    span.last_use[link] = position
                    spec = Linked(link, t.requires_grad)
                held[id(t)] = spec
            return spec

        self.arguments: Any = map_tensors(snapshot_caches((args, kwargs)), specify)

    def links(self) -> dict[Link, Linked]:
        """What the call takes from earlier calls."""
        found: dict[Link, Linked] = {}
        _each(self.arguments, Linked, lambda x: found.setdefault(x.link, x))
        return found

    def materialize(self, available: dict[Link, torch.Tensor]) -> tuple[Any, dict[str, Any]]:
        """The arguments anew: the same values, the same ``requires_grad``, a graph of their own.

        Raises:
            RuntimeError: an argument was changed in place since.
        """
        made: dict[Any, torch.Tensor] = {}

        def make(spec: Any) -> torch.Tensor:
            key = spec.link if isinstance(spec, Linked) else id(spec)
            if key not in made:
                source = available[spec.link] if isinstance(spec, Linked) else spec.tensor
                if isinstance(spec, Held) and source._version != spec.version:
                    raise RuntimeError(
                        CHANGED.format(
                            what=f"an argument of {self.program.key[0]}",
                            saved=spec.version,
                            found=source._version,
                        )
                    )
                made[key] = source.detach().requires_grad_(spec.requires_grad)
            return made[key]

        # caches inside are copied once more, so that a second replay finds them as they were
        args, kwargs = snapshot_caches(map_tensors(self.arguments, make, (Held, Linked)))
        return args, kwargs

    def release(self) -> None:
        """Lets go of every tensor."""
        self.arguments = None
        self.buffers = {}
        self.attributes = {}
        self.cached = None
        self.random = None


def _each(tree: Any, kind: type, fn: Any) -> None:
    def visit(x: Any) -> Any:
        fn(x)
        return x

    map_tensors(tree, visit, kind)
