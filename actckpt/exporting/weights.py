"""The canonical table of weights: what every exporter reads, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from actckpt.errors import WeightsExportError

# a checkpoint read without its model does not tell parameters from persistent buffers
Role = Literal["parameter", "buffer", "non-persistent", "saved"]


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor under its global shape, conjugate and negative bits resolved."""

    name: str
    tensor: torch.Tensor
    role: Role

    @property
    def size_bytes(self) -> int:
        """Size of its elements."""
        return self.tensor.numel() * self.tensor.itemsize


@dataclass(frozen=True, slots=True)
class WeightTable:
    """Weights by name, in the order of the model's ``state_dict``.

    Args:
        weights: by name; wrappers' prefixes are taken off.
        tied: groups of names of one and the same tensor.
        views: groups of names whose tensors overlap in memory without being the same.
        left_out: names of what is no tensor, or no part of the export.
        facts: of the run that they are from; empty for a model.
    """

    weights: dict[str, Weight]
    tied: tuple[tuple[str, ...], ...] = ()
    views: tuple[tuple[str, ...], ...] = ()
    left_out: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def persistent(self) -> dict[str, torch.Tensor]:
        """What a ``state_dict`` holds: all but non-persistent buffers."""
        return {n: w.tensor for n, w in self.weights.items() if w.role != "non-persistent"}

    @property
    def size_bytes(self) -> int:
        """Size of what `persistent` has, tied tensors once for each of their names."""
        return sum(w.size_bytes for w in self.weights.values() if w.role != "non-persistent")


def make_table(
    tensors: Mapping[str, Any],
    roles: Mapping[str, Role],
    where: str,
    *,
    facts: Mapping[str, Any] | None = None,
    left: Iterable[str] = (),
) -> WeightTable:
    """The table of a state.

    Args:
        tensors: by name; what is no tensor is left out, by name.
        roles: by name; one that has none is "saved".
        where: what they are from, for messages.
        left: further names that are left out.

    Raises:
        WeightsExportError: there are none, or one that has no elements of its own here.
    """
    found = {n: x for n, x in tensors.items() if isinstance(x, torch.Tensor)}
    if not found:
        raise WeightsExportError(
            f"{where} has no tensors by name; export an item such as model or ema"
        )
    for name, tensor in found.items():
        _check(name, tensor, where)
    tied, views = _shared(found)
    plain = {name: _plain(x) for name, x in found.items()}
    for group in views:
        _part(plain, group)
    return WeightTable(
        weights={n: Weight(n, x, roles.get(n, "saved")) for n, x in plain.items()},
        tied=tied,
        views=views,
        left_out=(*(n for n in tensors if n not in found), *left),
        facts=dict(facts or {}),
    )


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits, NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def check_same(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str
) -> None:
    """That what was read back are the very names and bits that were written.

    Args:
        what: has read them, for messages.

    Raises:
        WeightsExportError: they are not; one that differs is named.
    """
    if found.keys() != expected.keys():
        name = min(found.keys() ^ expected.keys())
        raise WeightsExportError(f"{what} reads other names than were written, such as {name}")
    for name, tensor in expected.items():
        if not same_bits(found[name], tensor):
            raise WeightsExportError(f"{what}: {name} did not read back bit for bit")


def _bytes(x: torch.Tensor) -> torch.Tensor:
    plain = _plain(x).cpu().contiguous()
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def _plain(x: torch.Tensor) -> torch.Tensor:
    # the libraries write the bytes that lie there, of a conjugate those of what it is one of
    return x.detach().resolve_conj().resolve_neg()


def _check(name: str, x: torch.Tensor, where: str) -> None:
    if hasattr(x, "full_tensor"):
        raise WeightsExportError(
            f"{where} has {name} spread over several processes: export from a checkpoint, or from "
            "a model whose weights were gathered (full_tensor)"
        )
    if x.is_meta or x.layout is not torch.strided:
        kind = "on the meta device" if x.is_meta else f"of layout {x.layout}"
        raise WeightsExportError(
            f"{where} has {name} {kind}: give it elements (a dense tensor) and export then"
        )


def _part(tensors: dict[str, torch.Tensor], names: Iterable[str]) -> None:
    """Gives windows that overlap memory of their own, those that are the same the same one.

    No file keeps a window on another tensor, and libraries refuse to save some.
    """
    made: dict[Any, torch.Tensor] = {}
    for name in names:
        x = tensors[name]
        window = (x.data_ptr(), x.dtype, x.shape, x.stride())
        tensors[name] = made.setdefault(window, x if window in made else x.clone())


def _shared(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """(tied, views): names of the same window on a storage, and of windows that overlap."""
    windows: dict[tuple[Any, ...], list[str]] = {}
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, x in tensors.items():
        if not x.numel():
            continue
        window = (x.data_ptr(), x.dtype, x.shape, x.stride(), x.is_conj(), x.is_neg(), x.device)
        windows.setdefault(window, []).append(name)
        reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        begin = x.data_ptr()
        spans.setdefault(x.untyped_storage().data_ptr(), []).append(
            (begin, begin + reach * x.itemsize, name)
        )
    tied = tuple(tuple(names) for names in windows.values() if len(names) > 1)
    same = {tuple(sorted(names)) for names in tied}
    views = tuple(g for parts in spans.values() for g in _overlapping(parts) if g not in same)
    return tied, views


def _overlapping(parts: Iterable[tuple[int, int, str]]) -> list[tuple[str, ...]]:
    groups: list[tuple[int, list[str]]] = []
    for begin, end, name in sorted(parts):
        if groups and begin < groups[-1][0]:
            reach, names = groups[-1]
            groups[-1] = (max(reach, end), [*names, name])
        else:
            groups.append((end, [name]))
    return [tuple(sorted(names)) for _, names in groups if len(names) > 1]
