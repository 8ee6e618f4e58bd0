"""Several optimizers of one run: an item of a checkpoint for each, under names that stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

ITEM = "optimizer"


def optimizer_items(given: Any) -> dict[str, Any]:
    """Item -> optimizer; a list's are numbered in its order, the first of them by no number."""
    if given is None or hasattr(given, "state_dict") or not isinstance(given, Iterable):
        return {ITEM: given}
    several = list(given.values() if isinstance(given, Mapping) else given)
    return {ITEM: several[0] if several else None} | {
        f"{ITEM}-{number}": optimizer for number, optimizer in enumerate(several) if number
    }


def is_optimizer_item(name: str) -> bool:
    """Whether an item is one of `optimizer_items`."""
    return name == ITEM or (name.startswith(f"{ITEM}-") and name[len(ITEM) + 1 :].isdecimal())


def with_every_optimizer(only: frozenset[str], names: Iterable[str]) -> frozenset[str]:
    """The items that are meant: ``optimizer`` means all of them."""
    return only | {n for n in names if is_optimizer_item(n)} if ITEM in only else only
