"""Saving broken on purpose, to see that it is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.faults import background_mutants as background
from tests.faults import pin_mutants as pins
from tests.faults import write_mutants as writes


@dataclass(frozen=True, slots=True)
class Mutant:
    """What is broken, and the name of the scene in which that does harm."""

    breaks: Callable[[pytest.MonkeyPatch], None]
    scene: str = "next"


MUTANTS = {
    "overwrite in place": Mutant(writes.overwrite_in_place),
    "delete before commit": Mutant(writes.delete_before_commit),
    "manifest first": Mutant(writes.manifest_first),
    "swallowed error": Mutant(writes.swallowed_error),
    "no fsync of the parent": Mutant(writes.no_fsync_of_the_parent),
    "no fsync of the new directory": Mutant(writes.no_fsync_of_the_new_directory),
    "no fsync of files": Mutant(writes.no_fsync_of_files),
    "no fsync on taking up": Mutant(writes.no_fsync_on_taking_up),
    "deleted in sight": Mutant(writes.deleted_in_sight),
    "write taken for whole": Mutant(writes.write_taken_for_whole),
    "error kept in the thread": Mutant(background.error_kept_in_the_thread, "due"),
    "error told again": Mutant(background.error_told_again, "due"),
    "error told late": Mutant(background.error_told_late, "due"),
    "second error dropped": Mutant(background.second_error_dropped, "two at a time"),
    "success before the rename": Mutant(background.success_before_the_rename, "due"),
    "staging without a copy": Mutant(background.staging_without_a_copy, "due"),
    "one staging set for two": Mutant(background.one_staging_set_for_two, "two at a time"),
    "pins overlooked": Mutant(pins.pins_overlooked, "pins"),
    "no fsync of pins": Mutant(pins.no_fsync_of_pins, "pins"),
}
