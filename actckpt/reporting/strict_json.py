"""JSON without extensions: no NaN, no infinity, a format name and a version in every document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from actckpt.errors import ReportError


def document(kind: str, version: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` under a header that says what they are."""
    return {"format": f"actckpt.{kind}", "format_version": version, **fields}


def fields_of(kind: str, version: int, data: Mapping[str, Any] | str) -> dict[str, Any]:
    """The fields of a document that `document` made.

    Args:
        data: the document, or its text.

    Raises:
        ReportError: ``data`` is no JSON object, or another format, or a version unknown here.
    """
    if isinstance(data, str):
        try:
            data = json.loads(data, parse_constant=_no_constant)
        except ValueError as error:
            raise ReportError(f"not a {kind}: {error}") from error
    if not isinstance(data, Mapping) or data.get("format") != f"actckpt.{kind}":
        raise ReportError(f"not a {kind}: expected a JSON object with format actckpt.{kind}")
    if data.get("format_version") != version:
        raise ReportError(
            f"this {kind} has format version {data.get('format_version')}; "
            f"this actckpt reads version {version}"
        )
    return {k: v for k, v in data.items() if k not in ("format", "format_version")}


def dumps(data: Mapping[str, Any]) -> str:
    """``data`` as indented JSON text with a newline at the end.

    Raises:
        ReportError: ``data`` holds NaN or an infinity.
    """
    try:
        return json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise ReportError(f"strict JSON has no NaN and no infinity: {error}") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not strict JSON")
