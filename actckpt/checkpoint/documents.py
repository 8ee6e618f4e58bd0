"""Strict JSON documents that carry their format, their version and their own checksum."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from actckpt.checkpoint.digest import CHECKSUM, checksum_of
from actckpt.errors import CheckpointFormatError

_SEAL = re.compile(rb',\n "checksum": "(' + CHECKSUM.encode() + rb':[0-9a-f]{32})"\n}\n')
_SEAL_BYTES = len(f',\n "checksum": "{CHECKSUM}:{"0" * 32}"\n}}\n')


def sealed(kind: str, version: int, fields: Mapping[str, Any]) -> bytes:
    """The text of a document, a line for every entry of its tables.

    Its last member is the checksum of every byte before it.

    Raises:
        ValueError, RecursionError: the fields are no strict JSON (NaN, too deep).
    """
    head = {"format": f"actckpt.{kind}", "format_version": version}
    members = (f" {_line(k)}: {_table(v)}" for k, v in {**head, **fields}.items())
    body = ("{\n" + ",\n".join(members)).encode("ascii")
    return body + f',\n "checksum": "{checksum_of(body)}"\n}}\n'.encode("ascii")


def without_table(raw: bytes, name: str) -> tuple[bytes, bytes]:
    """A document as if one of its tables were empty, and the lines of that table.

    What has not the lines that `sealed` writes is left as it is.
    """
    head = f'\n "{name}": {{'.encode("ascii")
    begin = raw.find(head + b"\n") + len(head)
    # no string has a line break in it, and the lines of a table begin with two spaces
    end = raw.find(b"\n }", begin)
    if begin < len(head) or end < 0:
        return raw, b""
    return raw[:begin] + raw[end:], raw[begin:end]


def _table(x: Any) -> str:
    if not isinstance(x, Mapping) or not x:
        return _line(x)
    return "{\n" + ",\n".join(f"  {_line(k)}: {_line(v)}" for k, v in x.items()) + "\n }"


# json's encoder is C only where it does not indent
_line = json.JSONEncoder(allow_nan=False).encode


def unsealed(
    raw: bytes | bytearray,
    kind: str,
    versions: Sequence[int],
    where: str,
    text: bytes | None = None,
) -> dict[str, Any]:
    """The fields of a document that `sealed` wrote, and its ``format_version``.

    Args:
        versions: those that are known here.
        where: the file, for messages.
        text: what `without_table` left of it, to be read in its stead.

    Raises:
        CheckpointFormatError: damaged, another format, or a version unknown here.
    """
    seal = _SEAL.fullmatch(raw, max(0, len(raw) - _SEAL_BYTES))
    body = memoryview(raw)[: len(raw) - _SEAL_BYTES]
    if seal is None or checksum_of(body) != seal[1].decode():
        # another version may be sealed in another way, and is no damage
        _check_version(_version_of(raw), versions, kind, where)
        raise CheckpointFormatError(
            f"{where} is damaged: it does not end in the checksum of its content; "
            "use another checkpoint"
        )
    try:
        data = parsed(raw if text is None else text, where)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{error}. Use another checkpoint") from error
    if not isinstance(data, dict) or data.get("format") != f"actckpt.{kind}":
        raise CheckpointFormatError(
            f"{where} is no actckpt.{kind} document; use another checkpoint"
        )
    _check_version(data.get("format_version"), versions, kind, where)
    return {k: v for k, v in data.items() if k not in ("format", "checksum")}


def parsed(raw: bytes | bytearray, where: str) -> Any:
    """Strict JSON: no NaN, no infinity, no member twice.

    Raises:
        CheckpointFormatError: it is not.
    """
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{where} is not strict JSON: {error}") from error


def _version_of(raw: bytes | bytearray) -> Any:
    found = re.match(rb'\{\s*"format": "actckpt\.[a-z]+",\s*"format_version": (\d{1,9}),', raw)
    return int(found[1]) if found else None


def _check_version(found: Any, known: Sequence[int], kind: str, where: str) -> None:
    if found is not None and found not in known:
        raise CheckpointFormatError(
            f"{where} has {kind} format version {found}; this actckpt reads version "
            f"{' and '.join(map(str, known))}: use the actckpt that wrote it"
        )


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a member twice")
    return found
