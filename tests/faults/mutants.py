"""Saving broken on purpose, to see that it is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.faults import background_mutants as background
from tests.faults import base_mutants as bases
from tests.faults import pin_mutants as pins
from tests.faults import write_mutants as writes


@dataclass(frozen=True, slots=True)
class Mutant:
    """What is broken, what the harm is called, and the name of the scene in which it is done."""

    breaks: Callable[[pytest.MonkeyPatch], None]
    harm: str
    scene: str = "next"


MUTANTS = {
    "overwrite in place": Mutant(writes.overwrite_in_place, "is truncated"),
    "delete before commit": Mutant(writes.delete_before_commit, "step 1 is lost"),
    "manifest first": Mutant(writes.manifest_first, "is begun after manifest.json"),
    "swallowed error": Mutant(writes.swallowed_error, "is truncated"),
    "no fsync of the parent": Mutant(writes.no_fsync_of_the_parent, "was said to be saved"),
    "no fsync of the new directory": Mutant(
        writes.no_fsync_of_the_new_directory, "is in sight and no checkpoint"
    ),
    "no fsync of files": Mutant(writes.no_fsync_of_files, "is in sight and no checkpoint"),
    "no fsync on taking up": Mutant(writes.no_fsync_on_taking_up, "was said to be saved"),
    "deleted in sight": Mutant(writes.deleted_in_sight, "is in sight and no checkpoint"),
    "write taken for whole": Mutant(writes.write_taken_for_whole, "a save fails that need not"),
    "error kept in the thread": Mutant(
        background.error_kept_in_the_thread, "step 4 is lost", "due"
    ),
    "error told again": Mutant(
        background.error_told_again, "it happened once, and is said 3 times", "due"
    ),
    "error told late": Mutant(background.error_told_late, "is said too late", "due"),
    "second error dropped": Mutant(
        background.second_error_dropped, "was said to be saved", "two at a time"
    ),
    "success before the rename": Mutant(background.success_before_the_rename, "is lost", "due"),
    "staging without a copy": Mutant(
        background.staging_without_a_copy, "holds another state", "due"
    ),
    "one staging set for two": Mutant(
        background.one_staging_set_for_two, "holds another state", "two at a time"
    ),
    "pins overlooked": Mutant(pins.pins_overlooked, "left lying: ['.pinned-", "pins"),
    "no fsync of pins": Mutant(pins.no_fsync_of_pins, "was pinned, and is not", "pins"),
    "base deleted first": Mutant(bases.base_deleted_first, "cannot be read", "frozen"),
    "base never deleted": Mutant(bases.base_never_deleted, "checkpoints name", "frozen"),
    "no fsync of the base": Mutant(bases.no_fsync_of_the_base, "cannot be read", "frozen"),
}
