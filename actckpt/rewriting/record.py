"""One stage call as recorded: everything needed to make it again, and as little memory as that."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actckpt.rewriting.holders import CHANGED
from actckpt.rewriting.node import Link, Span
from actckpt.rewriting.program import StageProgram
from actckpt.tracing.call import map_tensors
from actckpt.tracing.fake import is_tracing, stands_in
from actckpt.tracing.opaque import snapshot_caches

if TYPE_CHECKING:
    from actckpt.rewriting.patch import PatchedForward


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
        patched: PatchedForward,
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


def torch_states(device_type: str) -> dict[str, torch.Tensor]:
    """States of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if device_type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def same_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor] | None) -> bool:
    """Whether torch's generators stand where they stood."""
    if is_tracing():
        return True  # fake tensors draw nothing
    return b is not None and all(torch.equal(state, b[name]) for name, state in a.items())


def generator_states(torch_too: bool, names: tuple[str, ...], device_type: str) -> Any:
    """States of the random generators that a stage moves, or None if it moves none."""
    if not torch_too and not names:
        return None
    states: dict[str, Any] = {}
    if torch_too:
        states.update(torch_states(device_type))
        if is_tracing() and not stands_in():
            # generators are real even in a dry run: let its meter see what the state costs; that
            # of an accelerator's is 16 bytes, and kept on the CPU
            states["stand-in"] = torch.empty(states["cpu"].numel(), dtype=torch.uint8)
    if "python" in names:
        states["python"] = random.getstate()
    if "numpy" in names:
        states["numpy"] = np.random.get_state()
    return states


def set_generator_states(states: Any) -> None:
    """Sets what `generator_states` returned."""
    for name, state in (states or {}).items():
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == "cuda":
            torch.cuda.set_rng_state(state)
        elif name == "python":
            random.setstate(state)
        elif name == "numpy":
            np.random.set_state(state)


def autocast_state(device_type: str) -> tuple[tuple[str, bool, torch.dtype], ...]:
    """(device type, enabled, dtype) of each autocast that could matter on this device."""
    return tuple(
        (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d))
        for d in dict.fromkeys(("cpu", device_type))
    )


def autocast_contexts(
    recorded: tuple[tuple[str, bool, torch.dtype], ...],
) -> list[AbstractContextManager[Any]]:
    """Contexts that bring a recorded autocast state back.

    Without the cache of weight casts: a cast of a replay must not outlive it, and its value is
    the same.
    """
    return [
        torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
        for device, enabled, dtype in recorded
        if enabled or torch.is_autocast_enabled(device)
    ]
