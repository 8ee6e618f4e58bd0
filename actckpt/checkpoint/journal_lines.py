"""The lines of a run's journal: what was seen after each optimizer step, to be compared when the
step is made again.

``journal.jsonl`` lies beside the checkpoints. Each line is a JSON object of its own whose last
member is a checksum of all bytes before it, so that a line that was damaged, or torn by the end of
its process, is told from one that says something else. There are four kinds:

- a head, ``{"format": "actckpt.journal", "format_version": 1, "branch": B, "after": 40,
  "versions": {...}}``: a branch begins. The lines after it that name branch B are of a run that
  went on from its step 40, and take the place of what earlier lines say of later steps;
- a step, ``{"branch": B, "step": 41, "batches": [digest, count], "random": {"python": digest,
  "numpy": ..., "torch": ...}, "metrics": {"loss": "0.25"}, "weights": [rotation, digests]}``:
  as it was when `Checkpointer.step` was called. Members that were not seen are left out. A metric
  is the `repr` of its float. ``weights`` are eight digits for each piece of the sample that the
  rotation of that name takes at this step;
- a save, ``{"branch": B, "saved": 7, "step": 40}``: the checkpoint of this serial number is of
  this branch. It is written before the checkpoint is, which may come to nothing;
- a comparison, ``{"branch": B, "again": [41, 47], "difference": null}``: these steps were made
  again, and came out as they were; or a text says where the first one differed.

Digests are XXH3, 64 bits, in hexadecimal digits: they find differences, not malice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import xxhash

FORMAT = "actckpt.journal"
VERSION = 1

_SEAL = re.compile(rb',"checksum":"([0-9a-f]{16})"}')
_SEAL_BYTES = len(',"checksum":"0123456789abcdef"}')
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of a branch.

    Args:
        after: the step that it goes on from.
        versions: what bits depend on beside the state of the run.
    """

    branch: str
    after: int
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Step:
    """What was seen after an optimizer step; None, or no entry, is what was not seen.

    Args:
        batches: a digest of those that were read since the step before, and how many.
        random: digests of random states by their names.
        metrics: texts of floats by the metrics' names.
        weights: the name of a rotation, and the digests of the pieces of its sample.
    """

    branch: str
    step: int
    batches: tuple[str, int] | None
    random: dict[str, str]
    metrics: dict[str, str]
    weights: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint of a branch, by its serial number."""

    branch: str
    serial: int
    step: int


@dataclass(frozen=True, slots=True)
class Again:
    """Steps that were made again, from the first to the last compared one."""

    branch: str
    first: int
    last: int
    difference: str | None


Record = Head | Step | Saved | Again


def head_line(head: Head) -> bytes:
    """As `parsed_line` reads it."""
    start = {"format": FORMAT, "format_version": VERSION, "branch": head.branch}
    return _sealed(_encode({**start, "after": head.after, "versions": head.versions}))


def step_line(record: Step) -> bytes:
    """As `parsed_line` reads it; once for every step, and so without detours."""
    text = f'{{"branch":"{record.branch}","step":{record.step}'
    if record.batches is not None:
        text += f',"batches":["{record.batches[0]}",{record.batches[1]}]'
    if record.random:
        text += f',"random":{_flat(record.random)}'
    if record.metrics:
        text += f',"metrics":{_flat(record.metrics)}'
    if record.weights is not None:
        text += f',"weights":["{record.weights[0]}","{record.weights[1]}"]'
    return _sealed(text + "}")


def _flat(texts: Mapping[str, str]) -> str:
    """Of texts that need no escapes, by names that may."""
    members = [f'{_name(name)}:"{text}"' for name, text in texts.items()]
    return f"{{{','.join(members)}}}"


_name = lru_cache(_encode)


def saved_line(record: Saved) -> bytes:
    """As `parsed_line` reads it."""
    return _sealed(_encode({"branch": record.branch, "saved": record.serial, "step": record.step}))


def again_line(record: Again) -> bytes:
    """As `parsed_line` reads it."""
    steps = [record.first, record.last]
    fields = {"branch": record.branch, "again": steps, "difference": record.difference}
    return _sealed(_encode(fields))


def _sealed(text: str) -> bytes:
    body = text[:-1].encode("ascii")
    return body + b',"checksum":"%s"}\n' % xxhash.xxh3_64_hexdigest(body).encode()


def is_sound(line: bytes | memoryview) -> bool:
    """Whether a line, without its end, is as it was written."""
    seal = _SEAL.fullmatch(line, max(0, len(line) - _SEAL_BYTES))
    return seal is not None and xxhash.xxh3_64_hexdigest(line[: seal.start()]) == seal[1].decode()


def parsed_line(line: bytes) -> Record | None:
    """What a line says; None where it is damaged, or of a version unknown here."""
    if not is_sound(line):
        return None
    try:
        return _record(json.loads(line))
    except (KeyError, TypeError, ValueError):
        return None  # sound, and so of another version


def _record(fields: Mapping[str, Any]) -> Record | None:
    branch = str(fields["branch"])
    if "format" in fields:
        if (fields["format"], fields["format_version"]) != (FORMAT, VERSION):
            return None
        return Head(branch, int(fields["after"]), dict(fields["versions"]))
    if "saved" in fields:
        return Saved(branch, int(fields["saved"]), int(fields["step"]))
    if "again" in fields:
        first, last = fields["again"]
        return Again(branch, int(first), int(last), fields["difference"])
    batches, weights = fields.get("batches"), fields.get("weights")
    return Step(
        branch,
        int(fields["step"]),
        None if batches is None else (str(batches[0]), int(batches[1])),
        dict(fields.get("random", {})),
        dict(fields.get("metrics", {})),
        None if weights is None else (str(weights[0]), str(weights[1])),
    )
