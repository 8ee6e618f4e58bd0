"""Which stored tensor goes into which of a model, and what stands in the way; nothing is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from actckpt.errors import CheckpointMismatchError
from actckpt.foreign.stored import StoredTensor
from actckpt.importing.live_tensors import groups_of
from actckpt.importing.loaded_weights import some
from actckpt.importing.naming import prefix_told
from actckpt.importing.source import is_extra_state


@dataclass(frozen=True, slots=True)
class Fit:
    """What can be loaded.

    Args:
        chosen: the stored tensors of a live one, by its first name in the model: several where the
            file has it under several of its names.
        missing: names of live tensors that the file has nothing for.
        unexpected: stored names that the model has nothing for.
        other_shape: (live name, as stored, as in the model).
        tied: the names of live tensors that have several.
    """

    chosen: Mapping[str, Mapping[str, StoredTensor]]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: tuple[tuple[str, str, str], ...]
    tied: tuple[tuple[str, ...], ...]


def fitted(
    stored: Mapping[str, StoredTensor],
    live: Mapping[str, torch.Tensor],
    to: Mapping[str, str],
) -> Fit:
    """Compares names and shapes.

    Args:
        to: the live name of each stored one that has one.
    """
    by_live: dict[str, list[str]] = {}
    for name, target in to.items():
        by_live.setdefault(target, []).append(name)
    chosen: dict[str, dict[str, StoredTensor]] = {}
    missing: list[str] = []
    other: list[tuple[str, str, str]] = []
    tied: list[tuple[str, ...]] = []
    for names in groups_of(live):
        if len(names) > 1:
            tied.append(names)
        found = {s: stored[s] for name in names for s in by_live.get(name, ())}
        shape = tuple(live[names[0]].shape)
        wrong = [(s, x) for s, x in found.items() if x.shape != shape]
        if wrong:
            other.append((names[0], str(list(wrong[0][1].shape)), str(list(shape))))
        elif found:
            chosen[names[0]] = found
        else:
            missing += names
    unexpected = tuple(name for name in stored if name not in to)
    return Fit(chosen, tuple(missing), unexpected, tuple(other), tuple(tied))


def check_strict(
    fit: Fit,
    strict: bool | str,
    where: str,
    stored: Collection[str],
    live: Collection[str],
    owner: str,
    not_run: tuple[str, ...],
) -> None:
    """Raises where what does not fit is more than ``strict`` allows.

    Args:
        owner: what of the library that the model is of can convert names; or "".
        not_run: modules of the model with code for loading that is not run.

    Raises:
        CheckpointMismatchError: it is, or nothing fits at all.
    """
    said = []
    if fit.other_shape and (strict or not fit.chosen):
        shapes = [f"{n} {there}, the model's is {here}" for n, there, here in fit.other_shape]
        said.append(f"other shapes: {some(shapes)}")
    if strict is True and fit.missing:
        said.append(f"it lacks {len(fit.missing)} of the model's: {some([*fit.missing])}")
    if strict is True and fit.unexpected:
        said.append(f"the model has nothing for {len(fit.unexpected)}: {some([*fit.unexpected])}")
    if strict is True and any(map(is_extra_state, (*fit.missing, *fit.unexpected))):
        said.append("extra state of modules is not loaded here: model.load_state_dict() loads it")
    if strict is True and not_run:
        said.append(
            "modules that load by hooks or a method of their own, which model.load_state_dict() "
            f"runs, and this does not: {some([*not_run])}"
        )
    if not said and not fit.chosen:
        said.append(
            f"none of its {len(stored)} tensors fits: it has {some([*stored])}; the model has "
            f"{some([*live])}"
        )
    if not said:
        return
    works = prefix_told(stored, live)
    if works:
        works = f"Names agree with {works}"
    elif owner and fit.missing and fit.unexpected:
        works = (
            f"Models of this library may be stored under other names than they have: {owner} "
            "converts them; pass the state_dict() of what that returns"
        )
    elif fit.other_shape and strict:
        works = "strict=False leaves tensors of other shapes as they are, and reports them"
    else:
        works = (
            'strict="shapes" loads what fits and reports the rest; names= says what tensors are '
            "called here"
        )
    lines = "\n".join(f"  {line}" for line in said)
    raise CheckpointMismatchError(
        f"{where} does not fit this model:\n{lines}\n{works}. Nothing was changed"
    )
