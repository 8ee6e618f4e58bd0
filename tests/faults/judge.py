"""What must hold of a directory, whatever happened to the process that wrote there."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import actckpt
from actckpt.checkpoint.discovery import discover
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.names import DELETING, PINNED, SAVING
from actckpt.checkpoint.verification import verify_files
from tests.faults.scenario import KEPT, Acted, advance, objects, state, states
from tests.test_checkpoint_encoding import same


def violations(directory: Path, acted: Acted, allowed: Collection[int]) -> list[str]:
    """What is wrong with a directory; leaves it one checkpoint richer.

    Args:
        allowed: steps that the newest checkpoint may have; 0 stands for none at all.
    """
    try:
        return [*_said(acted), *_found(directory, acted, allowed), *_goes_on(directory)]
    except (actckpt.ActckptError, OSError) as error:
        return [f"the next process fails: {error}"]


def _said(acted: Acted) -> list[str]:
    if acted.error is not None and not isinstance(acted.error, actckpt.CheckpointError):
        return [f"a raw {type(acted.error).__name__}: {acted.error}"]
    return []


def _found(directory: Path, acted: Acted, allowed: Collection[int]) -> list[str]:
    found = discover(Files(), str(directory))
    wrong = [f"{s.name} is in sight and no checkpoint: {s.reason}" for s in found.skipped]
    for checkpoint in found.checkpoints:
        try:
            verify_files(Files(), str(checkpoint.path))
        except actckpt.CheckpointError as error:
            wrong.append(str(error))
    newest = found.checkpoints[0].step if found.checkpoints else 0
    if newest not in allowed:
        wrong.append(f"the newest checkpoint is of step {newest}, not of {sorted(allowed)}")
    if acted.claimed is not None and newest < acted.claimed:
        wrong.append(f"step {acted.claimed} was said to be saved; the newest is {newest}")
    return wrong


def _goes_on(directory: Path) -> list[str]:
    """Resumes as the next process would, bit for bit, saves, and looks at what is left lying."""
    wrong = []
    made = objects()
    with actckpt.Checkpointer(directory, **made, every=None, keep_last=KEPT) as run:
        newest = max((c.manifest.serial, c.step) for c in run.list())[1] if run.list() else 0
        run.resume()
        if run.step_count != newest:
            wrong.append(f"the next process resumes step {run.step_count}, not the newest")
        if not same(state(made), states()[run.step_count]):
            wrong.append(f"step {run.step_count} is resumed in another state")
        advance(run, made)
        run.save()
        if not same(state(made), states()[run.step_count]):
            wrong.append(f"step {run.step_count} comes out in another state")
        if run.list()[0].step != run.step_count or len(run.list()) > KEPT:
            wrong.append(f"then there are {[c.path.name for c in run.list()]}")
    left = [n for n in os.listdir(directory) if n.startswith((SAVING, DELETING, PINNED))]
    return wrong + ([f"left lying: {left}"] if left else [])
