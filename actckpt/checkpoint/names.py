"""What the entries of a run's directory are called."""

from __future__ import annotations

import os
import re
import secrets

MANIFEST = "manifest.json"
STATE = "state.json"
LOCK = ".lock"
JOURNAL = "journal.jsonl"
# both are cleaned up by whoever holds the lock
SAVING = ".saving-"
DELETING = ".deleting-"
PINNED = ".pinned-"
# checkpoints of a run that another one took the place of; nobody deletes them
SET_ASIDE = "set-aside-"
# tensors that no step changes, beside the checkpoints that share them
FROZEN = "frozen-base"

_STEP = re.compile(r"step-(\d{8,18})(?:\.(\d{1,6}))?")
_JOURNAL = re.compile(r"journal(-\d{5,})?\.jsonl")
_BASE = re.compile(FROZEN + r"/([0-9a-f]{32})\.safetensors")
_ITEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


def step_name(step: int, attempt: int = 0) -> str:
    """``step-00001200``; ``step-00001200.1`` where that exists and must stay."""
    return f"step-{step:08d}" + (f".{attempt}" if attempt else "")


def parse_step_name(name: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint's directory name, or None."""
    found = _STEP.fullmatch(name)
    if found is None:
        return None
    key = int(found[1]), int(found[2] or 0)
    return key if step_name(*key) == name else None


def is_file_name(name: str) -> bool:
    """Whether a manifest may name this file: a plain name, in the checkpoint's own directory."""
    stem, _, ending = name.partition(".")
    return is_item_name(stem) and ending in ("safetensors", "json")


def base_file(checksum: str) -> str:
    """What a manifest calls a file of frozen tensors, which has the name of its own checksum."""
    return f"{FROZEN}/{checksum.rpartition(':')[2]}.safetensors"


def is_base_file(name: str) -> bool:
    """Whether it is one of `base_file`."""
    return _BASE.fullmatch(name) is not None


def path_of(directory: str, file: str) -> str:
    """Where a file lies that the manifest of the checkpoint in ``directory`` names."""
    if not is_base_file(file):
        return f"{directory}/{file}"
    parent, name = os.path.split(directory)
    if name.startswith(SAVING) or parse_step_name(name) is not None:
        return f"{parent or '.'}/{file}"
    # under another name, such as "." or that of a link
    return f"{directory}/../{file}"


def is_item_name(name: str) -> bool:
    """Whether an item of a state may be called so: its file has that name."""
    return _ITEM.fullmatch(name) is not None


def journal_file(rank: int) -> str:
    """Each rank has its own; the first one's is called as that of a process on its own."""
    return f"journal-{rank:05d}.jsonl" if rank else JOURNAL


def is_journal(name: str) -> bool:
    """Whether it is one of `journal_file`."""
    return _JOURNAL.fullmatch(name) is not None


def rank_file(rank: int) -> str:
    """The manifest of a rank's share."""
    return f"rank-{rank:05d}.json"


def state_file(rank: int) -> str:
    """What of a rank's state is no tensor."""
    return f"state-{rank:05d}.json"


def share_file(item: str, rank: int) -> str:
    """A rank's part of an item's tensors."""
    return f"{item}-{rank:05d}.safetensors"


def unique(prefix: str, name: str) -> str:
    """A name that no other process and no earlier attempt has used."""
    return f"{prefix}{name}-{os.getpid()}-{secrets.token_hex(4)}"
