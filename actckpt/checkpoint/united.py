"""What several ranks have of one state, as one: stages of a pipeline have other names each."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

# of every rank its own: what it draws, reads and has in hand
PER_RANK = ("progress", "position", "random", "generators", "under-way", "left-out", "identities")


def united_items(
    trees: Iterable[dict[str, Any]], joined: Container[str] | None = None
) -> dict[str, Any]:
    """By item, what several ranks have; of those in ``PER_RANK`` what the first has that has it.

    Args:
        joined: items that are joined, of any other it is likewise what the first has; None is all.
    """
    found: dict[str, Any] = {}
    for tree in trees:
        for item, part in tree.items():
            if item not in found:
                found[item] = part
            elif item not in PER_RANK and (joined is None or item in joined):
                found[item] = united(found[item], part)
    return found


def united(a: Any, b: Any) -> Any:
    """Every entry that one of two trees has; where they differ, that of the first.

    Objects are joined entry by entry, ordered ones likewise; anything else is taken whole.
    """
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return a
    if not a:
        return b
    tag = next(iter(a), "")
    if tag in ("$dict", "$ordered") and list(a) == list(b):
        keys = [pair[0] for pair in a[tag]]
        return {tag: a[tag] + [pair for pair in b[tag] if pair[0] not in keys]}
    if tag.startswith("$") or next(iter(b), "").startswith("$"):
        return a
    return {**{k: united(v, b[k]) if k in b else v for k, v in a.items()},
            **{k: v for k, v in b.items() if k not in a}}  # fmt: skip
