"""Puts a plan in force on a model's instances of modules, and takes it off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from actckpt.errors import PlanError
from actckpt.rewriting.patch import PatchedForward, patch_of, patches
from actckpt.rewriting.rewrite import Rewrite
from actckpt.tracing.forwards import FORWARD, TAKEN, Replaced, wrapped
from actckpt.tracing.lightning import TRAINING_STEP

# the methods by which a model may be entered
ENTRIES = (FORWARD, TRAINING_STEP)


def install(rewrite: Rewrite, *, on_top: bool = False) -> None:
    """Puts a rewrite in force on its model, in place of any other.

    A patch that somebody has wrapped stays where it is, and follows the new plan. Where another
    model's patch stands, this one's goes on top.

    Args:
        on_top: of what others have put on the model itself since, whether it calls ours or not.
    """
    model = rewrite.root()
    if model is None:
        raise PlanError("the planned model no longer exists")
    uninstall(model)
    places = [(path, FORWARD) for path in set(rewrite.program.paths) - {""}]
    for path, name in (*places, *(("", entry) for entry in rewrite.entries)):
        module = rewrite.module(path)
        for other in list(patches(module, name)):
            if not other.is_meant():
                _take_off(module, other)
        patched = patch_of(module, model, name)
        if patched is not None and not (on_top and not path):
            patched.path, patched.rewrite, patched.off = path, rewrite, False
        else:
            original = module.__dict__.get(name)
            module.__dict__[name] = PatchedForward(module, path, rewrite, original, name)


def uninstall(model: nn.Module) -> Rewrite | None:
    """Takes the rewrite off a model, if there is one, and returns it."""
    found = installed(model)
    for module in model.modules():
        for name in ENTRIES if module is model else (FORWARD,):
            patched = patch_of(module, model, name)
            if patched is not None:
                _take_off(module, patched)
    return found


def _take_off(module: nn.Module, patched: PatchedForward) -> None:
    """Removes one patch of a module; one that is wrapped passes calls on from now on."""
    name = patched.name
    above = next((p for p in patches(module, name) if p.original is patched), None)
    if above is not None:
        above.original = patched.original
        return
    if wrapped(module, name) is patched:
        patched.off = True
        return
    if module.__dict__.get(TAKEN) is patched:
        del module.__dict__[TAKEN]
    below: Any = patched.original
    if below is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = below
    if isinstance(below, Replaced):
        below.stands()


@contextmanager
def in_force(model: nn.Module, rewrite: Rewrite) -> Iterator[None]:
    """A rewrite on a model that has none, for a while."""
    install(rewrite)
    try:
        yield
    finally:
        uninstall(model)


def installed(model: nn.Module) -> Rewrite | None:
    """The rewrite in force on a model."""
    found = (patch_of(model, model, name) for name in ENTRIES)
    return next((p.rewrite for p in found if p is not None and not p.off), None)
