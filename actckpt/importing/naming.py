"""Which tensor of a model a name in a file stands for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeAlias

from torch import nn

from actckpt.checkpoint.wrapped_names import without_wrappers
from actckpt.errors import ArgumentError, CheckpointMismatchError

Names: TypeAlias = Mapping[str, str | None] | Callable[[str], str | None]


def renamed(stored: Iterable[str], names: Names | None) -> dict[str, str]:
    """What each stored name is called as ``names`` has it, without those that it leaves out.

    Args:
        names: a function, or a table of names, and of beginnings of names: those that end with a
            dot or a slash, or are empty. The longest that fits counts. None leaves a tensor out.

    Raises:
        ArgumentError: it gives something else, or one name to two tensors.
    """
    found: dict[str, str] = {}
    for name in stored:
        new = name if names is None else _new_name(name, names)
        if new is None:
            continue
        if not isinstance(new, str):
            raise ArgumentError(f"names gives {new!r:.60} for {name}: give a name, or None")
        found[name] = new
    if twice := [new for new, n in Counter(found.values()).items() if n > 1]:
        of = [old for old, new in found.items() if new == twice[0]]
        raise ArgumentError(f"names gives one name, {twice[0]}, to {' and '.join(of[:3])}")
    return found


def _new_name(name: str, names: Names) -> str | None:
    if not isinstance(names, Mapping):
        return names(name)
    if name in names:
        return names[name]
    fits = [p for p in names if (not p or p.endswith((".", "/"))) and name.startswith(p)]
    if not fits:
        return name
    longest = max(fits, key=len)
    new = names[longest]
    return None if new is None else new + name[len(longest) :]


def matched(stored: Collection[str], live: Collection[str]) -> dict[str, str]:
    """The live name of each stored one that has one.

    Names that do not agree as they are may agree without what wrappers add to them (``module.``,
    ``_orig_mod.``), on either side.

    Raises:
        CheckpointMismatchError: two stored names are one without it.
    """
    found = {name: name for name in stored if name in live}
    if len(found) == len(stored):
        return found
    plain = {new: old for old, new in without_wrappers(live).items()}
    taken = set(found.values())
    for name, new in without_wrappers(stored).items():
        to = plain.get(new)
        if name in found or to is None:
            continue
        if to in taken:
            raise CheckpointMismatchError(
                f"{name} and another tensor of the file are both {to} without what wrappers add "
                "to names: leave one of them out by names={...: None}. Nothing was changed"
            )
        taken.add(to)
        found[name] = to
    return found


# what torch.optim.swa_utils.AveragedModel counts
_COUNT = "n_averaged"


def counts_of(stored: Collection[str], live: Collection[str]) -> set[str]:
    """The name in a file of how many models an average was made of."""
    rest = [name for name in stored if name != _COUNT]
    is_average = len(rest) < len(stored) and all(name.startswith("module.") for name in rest)
    return {_COUNT} if is_average and _COUNT not in live else set()


def is_ignored(name: str, model: nn.Module) -> bool:
    """Whether a model says itself that older files hold this, and it needs it no more.

    Those of transformers do.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def prefix_told(stored: Collection[str], live: Collection[str]) -> str:
    """What ``names`` would make more of the names agree, as one would write it; or ""."""
    best, most = "", len(matched(stored, live))
    for old, new in _changes(stored, live):
        changed = {new + name.removeprefix(old) for name in stored}
        if (count := len(changed & set(live))) > most:
            best, most = f'names={{"{old}": "{new}"}}', count
    return best


def _changes(stored: Collection[str], live: Collection[str]) -> Iterable[tuple[str, str]]:
    """(beginning of names in the file, in the model)."""
    yield from ((prefix, "") for prefix in sorted(_beginnings(stored)))
    yield from (("", prefix) for prefix in sorted(_beginnings(live)))


def _beginnings(names: Iterable[str]) -> set[str]:
    found = set()
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[:n]) + "." for n in (1, 2) if len(parts) > n}
    return found
