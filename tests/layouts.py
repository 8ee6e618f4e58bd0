"""Are results laid out by fake kernels as by real ones? Operations on drawn layouts, compared."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from actckpt.profiler.arguments import rebuild, span
from actckpt.profiler.timing import alone
from actckpt.tracing.call import map_tensors
from actckpt.tracing.kernel_outputs import fake_outputs
from actckpt.tracing.layouts import dense
from actckpt.tracing.mode import SKIPPED, flat_outputs, flat_tensors
from actckpt.tracing.real_values import attach_real
from actckpt.tracing.signature import encode, settled
from actckpt.tracing.value_shapes import known_results

LARGEST_BYTES = 1 << 26
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Difference:
    """One result that fake and real kernels lay out otherwise.

    ``kind``: "size 1" where only steps over a single element differ, "strides", "bytes" (of the
    result's own storage), "shape", "dtype", or "refused" where the fake kernel raises.
    """

    signature: str
    output: int
    kind: str
    fake: str
    real: str


class Collector(TorchDispatchMode):
    """Notes the signature of every operation that a step calls on strided tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.signatures: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = list(flat_tensors((*args, *kwargs.values())))
        counts = func not in SKIPPED and func.namespace == "aten" and found
        if counts and all(t.layout == torch.strided for t in found):
            self.signatures.setdefault(encode(str(func), args, kwargs))
        return func(*args, **kwargs)


def layouts(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Ways for a tensor of a shape to lie in memory, by name."""
    n = len(shape)
    inwards = tuple(range(n - 1, -1, -1))
    contiguous = dense(shape, inwards)
    found = {"contiguous": contiguous}
    if n >= 2:
        found["transposed"] = dense(shape, (n - 2, n - 1, *inwards[2:]))
        found["expanded"] = (0, *contiguous[1:])
    if n >= 1:
        found["sliced"] = tuple(2 * s for s in contiguous)
        rows = list(contiguous)
        rows[0] *= 3
        found["every third row"] = tuple(rows)
    if n >= 3:
        found["channels last"] = dense(shape, (1, *(d for d in inwards if d != 1)))
    if n >= 4:
        found["middle swapped"] = dense(shape, (n - 1, 1, *inwards[1:-2], 0))
    for name, strides in list(found.items()):
        if 1 in shape:
            found[f"{name}, size 1 aside"] = tuple(
                1 if size == 1 else s for s, size in zip(strides, shape, strict=True)
            )
            found[f"{name}, size 1 far"] = tuple(
                7 * span(shape, contiguous) if size == 1 else s
                for s, size in zip(strides, shape, strict=True)
            )
    return found


def drawn(signature: str) -> Iterator[str]:
    """The signature, and the same with its tensors laid out otherwise: alike, and one by one."""
    data = json.loads(signature)
    found = list(_encoded(data[1:]))
    seen = {signature}
    yield signature
    kinds = list(dict.fromkeys(k for t in found for k in layouts(tuple(t["t"][0]))))
    before = [t["t"][1] for t in found]
    everyone = range(len(found))
    choices = [(kind, everyone) for kind in kinds]
    choices += [(kind, range(n, n + 1)) for kind in kinds for n in everyone[:3]]
    for kind, which in choices:
        for n, t in enumerate(found):
            options = layouts(tuple(t["t"][0]))
            t["t"][1] = before[n]
            if n in which and len(before[n]) == len(t["t"][0]):
                t["t"][1] = list(options.get(kind, before[n]))
        text = json.dumps(data, separators=(",", ":"))
        if text not in seen:
            seen.add(text)
            yield text


def small(signature: str) -> Iterator[str]:
    """The signature, and the same with each leading dimension that all its tensors share as 1."""
    yield signature
    data = json.loads(signature)
    found = list(_encoded(data[1:]))
    sizes = {t["t"][0][0] for t in found if len(t["t"][0]) > 1}
    if len(sizes) != 1 or sizes == {1} or not _only_tensors(data[1]):
        return
    for t in found:
        if len(t["t"][0]) > 1:
            t["t"][0][0] = 1
    yield json.dumps(data, separators=(",", ":"))


def _only_tensors(args: list[Any]) -> bool:
    """Whether no argument speaks of sizes."""
    return not any(isinstance(a, list) and a and isinstance(a[0], int) for a in args)


def _encoded(x: Any) -> Iterator[dict[str, Any]]:
    for item in x.values() if isinstance(x, dict) else x:
        if isinstance(item, dict) and "t" in item:
            yield item
        elif isinstance(item, (list, dict)):
            yield from _encoded(item)


def differences(signature: str) -> list[Difference] | None:
    """What fake kernels lay out otherwise; None if the real one takes no such arguments."""
    with alone(CPU):
        try:
            op, args, kwargs = rebuild(signature, lambda device: CPU)
            mode = FakeTensorMode()
            fakes = map_tensors((args, kwargs), partial(_faked, mode))
            with torch.enable_grad():  # oneDNN's LSTM returns a workspace only then
                real = op(*args, **kwargs)
        except Exception:  # whatever a kernel objects to
            return None
        try:
            with mode, torch.no_grad():
                fake = _fake_outputs(op, *fakes)
        except Exception as error:
            return [Difference(signature, 0, "refused", f"{type(error).__name__}: {error}", "")]
    made = list(flat_outputs(real))
    given = {t.untyped_storage()._cdata for t in flat_tensors((args, kwargs))}
    found = []
    faked = list(flat_outputs(fake))
    if len(faked) != len(made):
        return [Difference(signature, 0, "count", str(len(faked)), str(len(made)))]
    for n, (f, r) in enumerate(zip(faked, made, strict=True)):
        difference = _of(f, r, r.untyped_storage()._cdata not in given)
        if difference is not None:
            found.append(Difference(signature, n, *difference))
    return found


def _faked(mode: FakeTensorMode, real: torch.Tensor) -> torch.Tensor:
    fake = mode.from_tensor(real)
    attach_real(fake, real)
    return fake


def _fake_outputs(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As a trace has them, where shapes depend on values, too."""
    try:
        return fake_outputs(op, args, kwargs)
    except (DynamicOutputShapeException, DataDependentOutputException):
        found = known_results(op, args, kwargs)
        if found is None:
            raise
        return found


def _of(f: torch.Tensor, r: torch.Tensor, own: bool) -> tuple[str, str, str] | None:
    if r.layout != torch.strided:
        return None
    for kind, of in _ASPECTS:
        if of(f) != of(r):
            return kind, str(of(f)), str(of(r))
    if f.stride() != r.stride():
        same = settled(f.shape, f.stride()) == settled(r.shape, r.stride())
        return "size 1" if same else "strides", str(f.stride()), str(r.stride())
    if own and f.untyped_storage().nbytes() != r.untyped_storage().nbytes():
        return "bytes", str(f.untyped_storage().nbytes()), str(r.untyped_storage().nbytes())
    return None


_ASPECTS: tuple[tuple[str, Callable[[torch.Tensor], Any]], ...] = (
    ("shape", lambda t: tuple(t.shape)),
    ("dtype", lambda t: str(t.dtype)),
)


def sweep(signatures: list[str]) -> Iterator[tuple[str, int, list[Difference]]]:
    """(operation, draws that its real kernel takes, differences), operation by operation."""
    by_op: dict[str, list[str]] = {}
    for s in signatures:
        by_op.setdefault(json.loads(s)[0], []).append(s)
    for op, own in sorted(by_op.items()):
        draws, found = 0, list[Difference]()
        for signature in dict.fromkeys(itertools.chain(*(map(small, own)))):
            for text in drawn(signature):
                these = differences(text)
                if these is not None:
                    draws += 1
                    found += these
        yield op, draws, found
