"""Weights from a file or folder into a model that exists: `load_weights`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.dtypes import name_of
from actckpt.checkpoint.wrapped_names import without_wrappers
from actckpt.errors import ArgumentError, CheckpointError, CheckpointMismatchError
from actckpt.foreign.stored import StoredTensor
from actckpt.importing.adapters import adapter_tensors, refuse_merged
from actckpt.importing.casting import cast_to
from actckpt.importing.fitting import Fit, check_strict, fitted
from actckpt.importing.live_tensors import live_tensors, put
from actckpt.importing.loaded_weights import LoadedWeights
from actckpt.importing.naming import Names, counts_of, is_ignored, matched, renamed
from actckpt.importing.opening import opened
from actckpt.importing.overlaps import changed_through_others
from actckpt.importing.own_loading import extra_states, own_loading
from actckpt.importing.scaled import refuse_without_scale

WeightsSource: TypeAlias = Checkpoint | str | os.PathLike[str] | Mapping[str, torch.Tensor]


def load_weights(
    model: nn.Module,
    source: WeightsSource,
    *,
    strict: bool | str = True,
    names: Names | None = None,
    transposed: Collection[str] = (),
    item: str | None = None,
) -> LoadedWeights:
    """What was loaded, missing, unexpected, of another shape, cast, and tied.

    Values are copied into the model's own tensors, which keep their dtype, device and ties, and all
    that holds them (an optimizer, a plan) stays as it is. After any error the model is as before.
    Nothing in a file is run: no pickle is loaded but by ``weights_only=True``.

    Args:
        source: a folder in the layout of Hugging Face, a file of safetensors or ``torch.save``, a
            checkpoint of Lightning, of a `Checkpointer` (or its directory, for the newest), of
            torch.distributed.checkpoint or of DeepSpeed (ZeRO-1, 2, 3, Universal: the weights in
            the optimizer's precision); or a state dict.
        strict: True: all names and shapes must agree, and no module may have extra state, or hooks
            or a method of its own for loading, which are not run here. "shapes": what does not is
            reported, and its tensors left alone; other shapes are an error. False: neither are
            they. What loads nothing is an error.
        names: what stored tensors are called in the model: a function, or a dict of names and of
            beginnings that end with a dot (or are empty: before every name). None leaves a tensor
            out. ``module.`` and ``_orig_mod.`` of wrappers need none.
        transposed: names of the model, or patterns such as ``"*.c_fc.weight"``, whose matrices are
            stored the other way round; wrappers' parts of names may be left out, and each must fit
            at least one matrix that is loaded.
        item: of a file with several parts, which: ``"ema"``; keys joined by dots. By default the
            model.

    Raises:
        ArgumentError: an argument is none of these, or the model has tensors that no value can be
            copied into.
        CheckpointError: there is no such file, or it cannot be read.
        CheckpointFormatError: it is damaged, empty, of another format, or hostile.
        CheckpointMismatchError: it is of another model.
    """
    if not isinstance(strict, bool) and strict != "shapes":
        raise ArgumentError(f'strict must be True, "shapes" or False; found {strict!r}')
    _check_patterns(transposed)
    whole = live = live_tensors(model)
    refuse_merged(model)
    found = opened(source, item)
    counts = counts_of(found.tensors, live)
    called = renamed(
        [*(name for name in found.tensors if name not in counts), *found.others], names
    )
    left_out_others = [name for name in found.others if name not in called]
    others = [called.pop(name) for name in found.others if name in called]
    originals = {new: old for old, new in called.items()}
    stored = {new: found.tensors[old] for old, new in called.items()}
    if found.adapter is not None:
        own = adapter_tensors(model, live, found)
        live = {name: live[name] for name in own.values()}
        to = {name: own[name] for name in stored if name in own}
    else:
        to = matched(stored, live)
    ignored = [n for n in (*stored, *others) if n not in to and is_ignored(n, model)]
    turned = _turned(stored, to, transposed)
    stored = {
        name: _transposed(x) if name in turned else x
        for name, x in stored.items()
        if name not in ignored
    }
    left_out = [*(n for n in found.tensors if n not in called), *left_out_others, *ignored]
    fit = fitted(stored, live, to)
    unknown = (name for name in others if name not in ignored)
    fit = replace(fit, unexpected=(*fit.unexpected, *unknown))
    not_run: tuple[str, ...] = ()
    if found.adapter is None:
        fit = replace(fit, missing=(*fit.missing, *extra_states(model)))
        not_run = own_loading(model, live)
    check_strict(fit, strict, found.where, stored, live, _owner(model), not_run)
    _check_all_fit(transposed, turned, found.where)
    for name, candidates in fit.chosen.items():
        for new, x in candidates.items():
            if x.dtype != live[name].dtype:
                refuse_without_scale(originals[new], x, found)
    try:
        values, cast = _values(fit, live, found.where)
    except OSError as error:
        raise CheckpointError(f"{found.where} cannot be read: {error}") from error
    loaded = _with_ties(values, fit)
    changed = changed_through_others(values, whole, found.where)
    put(values, live)
    return LoadedWeights(
        source=found.where,
        kind=found.kind,
        loaded=tuple(name for name in live if name in loaded),
        missing=tuple(name for name in fit.missing if name not in changed),
        unexpected=fit.unexpected,
        other_shape=fit.other_shape,
        cast=tuple(cast),
        tied=tuple(names for names in fit.tied if names[0] in loaded),
        left_out=tuple(left_out),
        changed=changed,
        not_run=not_run,
        transposed=tuple(dict.fromkeys(to[name] for name in turned)),
    )


def _values(
    fit: Fit, live: Mapping[str, torch.Tensor], where: str
) -> tuple[dict[str, torch.Tensor], list[tuple[str, str, str]]]:
    """What will be in the live tensors, all read, and which of it was cast."""
    values: dict[str, torch.Tensor] = {}
    cast = []
    for name, candidates in fit.chosen.items():
        (first, stored), *others = candidates.items()
        value = stored.read()
        for other, also in others:
            if also is not stored and not _same_bits(value, also.read()):
                raise CheckpointMismatchError(
                    f"{where} has other values for {first} than for {other}, which are one tensor "
                    f'in this model: choose one, names={{"{other}": None}}, or load into a model '
                    "in which they are not tied. Nothing was changed"
                )
        wanted = live[name].dtype
        if value.dtype != wanted:
            cast.append((name, name_of(value.dtype), name_of(wanted)))
            value = cast_to(value, wanted, name, where)
        values[name] = value
    return values, cast


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(*flat)


def _with_ties(values: Mapping[str, Any], fit: Fit) -> set[str]:
    found = set(values)
    for names in fit.tied:
        if names[0] in found:
            found |= set(names)
    return found


def _transposed(x: StoredTensor) -> StoredTensor:
    if len(x.shape) < 2:
        return x
    shape = (*x.shape[:-2], x.shape[-1], x.shape[-2])
    return StoredTensor(shape, x.dtype, lambda: x.read().transpose(-1, -2).contiguous())


def _check_patterns(transposed: Collection[str]) -> None:
    if isinstance(transposed, str) or not all(isinstance(p, str) for p in transposed):
        raise ArgumentError(
            f"transposed must be a list of names or patterns; found {transposed!r:.80}: write "
            f'transposed=["*.weight"]'
        )


def _turned(
    stored: Mapping[str, StoredTensor], to: Mapping[str, str], patterns: Collection[str]
) -> dict[str, set[str]]:
    """Of each stored matrix that is to be transposed, the patterns that its name here fits."""
    plain = without_wrappers(to.values())
    found = {
        name: {p for p in patterns if fnmatchcase(live, p) or fnmatchcase(plain[live], p)}
        for name, live in to.items()
        if len(stored[name].shape) > 1
    }
    return {name: fits for name, fits in found.items() if fits}


def _check_all_fit(patterns: Collection[str], turned: Mapping[str, set[str]], where: str) -> None:
    used = set().union(*turned.values())
    if unused := [p for p in patterns if p not in used]:
        raise ArgumentError(
            f"transposed={unused!r:.120} fits no matrix that {where} has for this model: give "
            "names of the model's, or patterns of them. Nothing was changed"
        )


def _owner(model: nn.Module) -> str:
    """What in the library of a model loads its folders, under whatever names they have."""
    kind = type(model)
    is_own = kind.__module__.partition(".")[0] in ("transformers", "diffusers")
    return f"{kind.__name__}.from_pretrained(folder)" if is_own else ""
