"""Plain data as text of at most a page: long fields are counted."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any

# characters: twenty lines
PAGE = 2000
# a tuple of more items is not written out to see how long it is
_MOST_ITEMS = 100


def brief(data: Any) -> str:
    """The ``repr`` of a dataclass, with its longest fields counted until it fits on a page."""
    values = {f.name: getattr(data, f.name) for f in fields(data) if f.repr}
    texts = {
        name: _counted(value) if _is_long(value) else repr(value) for name, value in values.items()
    }
    for name in sorted(values, key=lambda name: -len(texts[name])):
        if sum(map(len, texts.values())) <= PAGE:
            break
        texts[name] = _counted(values[name])
    inside = ", ".join(f"{name}={text}" for name, text in texts.items())
    return f"{type(data).__name__}({inside})"


def _is_long(value: object) -> bool:
    return isinstance(value, (tuple, list, dict)) and len(value) > _MOST_ITEMS


def _counted(value: object) -> str:
    """``<812 Storage>``, ``<Schedule>``, or the text itself where it is no data."""
    if is_dataclass(value):
        return f"<{type(value).__name__}>"
    if isinstance(value, str) or not isinstance(value, Collection):
        return repr(value)
    items = value.values() if isinstance(value, dict) else value
    kinds = {type(item).__name__ for item in items}
    return f"<{len(value)}{f' {kinds.pop()}' if len(kinds) == 1 else ''}>"
