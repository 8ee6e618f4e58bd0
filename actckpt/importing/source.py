"""What a file or folder offers to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actckpt.errors import CheckpointError, CheckpointFormatError
from actckpt.foreign.stored import StoredTensor

# what others keep a model's state under, likeliest first
_USUAL = ("model", "state_dict", "model_state_dict", "module", "weights", "net")


@dataclass(frozen=True, slots=True)
class Source:
    """Weights that can be read, by the names that they have where they lie.

    Args:
        where: the file or folder.
        kind: what it is, for messages.
        tensors: none of them read yet.
        adapter: the configuration of a PEFT adapter, which is no whole model.
        others: names of what lies among them and is no tensor, such as modules' extra state.
    """

    where: str
    kind: str
    tensors: Mapping[str, StoredTensor]
    adapter: Mapping[str, Any] | None = None
    others: tuple[str, ...] = ()


# what torch keeps under such a name is whatever get_extra_state gives
EXTRA_STATE = "_extra_state"


def is_extra_state(name: str) -> bool:
    """Whether a name in a state dict is of a module's extra state."""
    return name.rpartition(".")[2] == EXTRA_STATE


def source_in(tree: Any, item: str | None, where: str, kind: str) -> Source:
    """One part of what a file holds; as `weights_in`."""
    found = _part(tree, item, where)
    others = tuple(name for name, x in found.items() if not isinstance(x, StoredTensor))
    return Source(where, kind, _tensors(found), others=others)


def weights_in(tree: Any, item: str | None, where: str) -> dict[str, StoredTensor]:
    """The tensors of one part of what a file holds, by their names in that part.

    Args:
        tree: dicts of dicts, with `StoredTensor` or other values at the leaves.
        item: keys joined by dots; None: the file's own tensors, or what lies under the usual key.

    Raises:
        CheckpointError: there is no such part.
        CheckpointFormatError: the file holds no tensors by name.
    """
    return _tensors(_part(tree, item, where))


def _part(tree: Any, item: str | None, where: str) -> dict[str, Any]:
    """The leaves of the part, tensors and others."""
    if not isinstance(tree, Mapping) or not tree:
        raise CheckpointFormatError(f"{where} holds no tensors by name: {_described(tree)}")
    if item is not None:
        found = tree
        for key in item.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None  # type: ignore[assignment]
        if not isinstance(found, Mapping):
            raise CheckpointError(
                f"{where} has no part {item!r}; it has {', '.join(_parts(tree)) or 'none'}"
            )
        leaves = _flat(found)
    else:
        leaves = _usual(tree, where)
    if not _tensors(leaves):
        raise CheckpointFormatError(f"{where} holds no tensors by name: {_described(tree)}")
    return leaves


def _tensors(leaves: Mapping[str, Any]) -> dict[str, StoredTensor]:
    return {name: x for name, x in leaves.items() if isinstance(x, StoredTensor)}


def _usual(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    # before tensors beside them: a loop may have saved a random state there
    for key in _USUAL:
        if isinstance(tree.get(key), Mapping) and _tensors(leaves := _flat(tree[key])):
            return leaves
    if _tensors(tree):
        # dicts beside them are other parts
        return {k: v for k, v in tree.items() if not isinstance(v, Mapping) or is_extra_state(k)}
    parts = _parts(tree)
    if len(parts) == 1:
        return _part(tree[parts[0]], None, f"{where}: {parts[0]}")
    raise CheckpointError(
        f"{where} has several parts, and none is called {', '.join(_USUAL)}: choose one of "
        f"{', '.join(parts) or 'none'} by item="
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not is_extra_state(key):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _parts(tree: Mapping[str, Any]) -> list[str]:
    return [str(k) for k, v in tree.items() if isinstance(v, Mapping)]


def _described(tree: Any) -> str:
    if isinstance(tree, Mapping):
        keys = [str(k) for k in tree]
        return f"its keys are {', '.join(keys[:8])}" if keys else "it is empty"
    return f"it is a {type(tree).__name__}"
