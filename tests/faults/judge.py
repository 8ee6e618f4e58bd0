"""What must hold of a directory, whatever happened to the process that wrote there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import actckpt
from actckpt.checkpoint.discovery import Checkpoint, discover
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.names import DELETING, FROZEN, PINNED, SAVING
from actckpt.checkpoint.reading import read_state
from tests.faults.saying import Acted
from tests.faults.scenario import KEPT, Before, advance, objects, saved_state, state, states
from tests.test_checkpoint_encoding import same


def violations(directory: Path, acted: Acted, known: Before) -> list[str]:
    """What is wrong with a directory; leaves it one checkpoint richer.

    Args:
        known: what was there before.
    """
    try:
        return [*_said(acted), *_found(directory, acted, known), *_goes_on(directory, acted, known)]
    except (actckpt.ActckptError, OSError) as error:
        return [f"the next process fails: {error}"]


def _said(acted: Acted) -> Iterator[str]:
    """What a process must not have been told."""
    for error in acted.errors:
        if not isinstance(error, actckpt.CheckpointSaveError):
            yield f"a save fails with a raw {type(error).__name__}: {error}"
    for error in acted.refused:
        if not isinstance(error, actckpt.CheckpointError):
            yield f"a raw {type(error).__name__}: {error}"
    for step in sorted({*acted.failed}):
        if acted.failed.count(step) > 1:
            yield f"that step {step} was not saved is said {acted.failed.count(step)} times"
        if step not in acted.begun or step in acted.claimed:
            yield f"that step {step} was not saved is said too late"


def _found(directory: Path, acted: Acted, known: Before) -> Iterator[str]:
    found = discover(Files(), str(directory))
    yield from (f"{s.name} is in sight and no checkpoint: {s.reason}" for s in found.skipped)
    for checkpoint in found.checkpoints:
        yield from _holds_its_step(checkpoint, known)
    steps = [c.step for c in found.checkpoints]
    newest = steps[0] if steps else 0
    if steps != sorted(steps, reverse=True):
        yield f"newest first the checkpoints are of steps {steps}"
    if newest not in (max(known.steps, default=0), *acted.begun):
        yield f"the newest checkpoint is of step {newest}, not of the last or a new one"
    for step in acted.claimed:
        if newest < step:
            yield f"step {step} was said to be saved; the newest is {newest}"
    for step in {*known.steps, *acted.claimed} - {*steps}:
        if sum(s > step for s in steps) < KEPT:
            yield f"step {step} is lost; there are {steps}"
    pinned = {c.step: c.pinned for c in found.checkpoints}
    for step, word in acted.pins.items():
        if word == "pinned" and not pinned.get(step):
            yield f"step {step} was pinned, and is not"
        if word == "unpinned" and pinned.get(step):
            yield f"step {step} is still pinned"


def _holds_its_step(checkpoint: Checkpoint, known: Before) -> Iterator[str]:
    """Reads every byte; what is saved must be the state of that very step, and of no later one."""
    try:
        _, items = read_state(Files(), str(checkpoint.path))
    except actckpt.CheckpointError as error:
        yield str(error)
        return
    step = checkpoint.step
    if not same(saved_state(items), states(known.frozen)[step]) or checkpoint.metrics != {
        "loss": 1.0 / step
    }:
        yield f"{checkpoint.path.name} holds another state than that of its step"


def _goes_on(directory: Path, acted: Acted, known: Before) -> Iterator[str]:
    """Resumes as the next process would, bit for bit, saves, and looks at what is left lying."""
    made = objects(frozen=known.frozen)
    with actckpt.Checkpointer(directory, **made, every=None, keep_last=KEPT) as run:
        newest = max((c.manifest.serial, c.step) for c in run.list())[1] if run.list() else 0
        run.resume()
        if run.step_count != newest:
            yield f"the next process resumes step {run.step_count}, not the newest"
        if not same(state(made), states(known.frozen)[run.step_count]):
            yield f"step {run.step_count} is resumed in another state"
        advance(run, made)
        run.save()
        if not same(state(made), states(known.frozen)[run.step_count]):
            yield f"step {run.step_count} comes out in another state"
        left = run.list()
    if run.verified.difference is not None:
        yield f"the journal is wrong: {run.verified.difference}"
    if left[0].step != run.step_count or sum(not c.pinned for c in left) > KEPT:
        yield f"then there are {[c.path.name for c in left]}"
    for step, word in acted.pins.items():
        if word == "pinned" and step not in [c.step for c in left]:
            yield f"step {step} was pinned, and is deleted"
    marks = {f"{PINNED}{c.path.name}" for c in left if c.pinned}
    rest = [n for n in os.listdir(directory) if n.startswith((SAVING, DELETING, PINNED))]
    if {*rest} - marks:
        yield f"left lying: {rest}"
    named = {file for c in left for file in c.manifest.base}
    if (found := {str(p.relative_to(directory)) for p in directory.glob(f"{FROZEN}/*")}) != named:
        yield f"checkpoints name {sorted(named)}, and there are {sorted(found)}"
