"""The state of an optimizer by the names of its parameters, whatever their order and their group.

Torch's optimizers number their parameters. Ranks of a pipeline have others each, and another world
may have them in another order. The names are those of `torch.distributed.checkpoint.state_dict`;
its functions are not used, for they put a state into an optimizer that has none (AdamW's first
update is another then), and take groups that were changed since without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from actckpt.errors import CheckpointMismatchError
from actckpt.resuming.parameter_names import ParameterNames

_FORM = "by name"


def names_of(item: str, optimizer: torch.optim.Optimizer, names: ParameterNames) -> list[list[str]]:
    """By group, a name for every parameter; that of one that no module has is its number."""
    found, number = [], 0
    for group in optimizer.param_groups:
        here = []
        for parameter in group["params"]:
            here.append(names.of(parameter) or f"{item}:{number}")
            number += 1
        found.append(here)
    return found


def is_by_name(state: Any) -> bool:
    """Whether a state is what `by_name` made."""
    return isinstance(state, Mapping) and state.get("form") == _FORM


def by_name(
    item: str, optimizer: torch.optim.Optimizer, names: ParameterNames, state: Mapping[str, Any]
) -> dict[str, Any]:
    """What a ``state_dict`` of it says, by names; what two ranks have of it can be joined."""
    return called(state, names_of(item, optimizer, names))


def called(state: Mapping[str, Any], groups: list[list[str]]) -> dict[str, Any]:
    """A ``state_dict`` whose parameters have these names, by group."""
    name_of = {
        number: name
        for group, here in zip(state["param_groups"], groups, strict=True)
        for number, name in zip(group["params"], here, strict=True)
    }
    return {
        "form": _FORM,
        "state": {name_of[number]: value for number, value in state["state"].items()},
        "groups": {name: str(n) for n, here in enumerate(groups) for name in here},
        "settings": {
            str(n): {k: v for k, v in group.items() if k not in ("params", "param_names")}
            for n, group in enumerate(state["param_groups"])
        },
        "others": {k: v for k, v in state.items() if k not in ("state", "param_groups")},
    }


def by_number(
    item: str,
    optimizer: torch.optim.Optimizer,
    names: ParameterNames,
    saved: Mapping[str, Any],
    elsewhere: Collection[str],
    where: str,
) -> dict[str, Any]:
    """The inverse of `by_name`: a ``state_dict`` for this optimizer.

    Args:
        elsewhere: names of parameters that other ranks have.
        where: the checkpoint, for messages.

    Raises:
        CheckpointMismatchError: its parameters are others, or in other groups.
    """
    live = optimizer.state_dict()
    groups = names_of(item, optimizer, names)
    here = {name: str(n) for n, group in enumerate(groups) for name in group}
    there: Mapping[str, str] = saved["groups"]
    missing = [name for name in here if name not in there]
    extra = [name for name in there if name not in here and name not in elsewhere]
    moved = [name for name in here if name in there and here[name] != there[name]]
    for names_in_doubt, what in (
        (missing, "is not in the checkpoint"),
        (extra, "is only in the checkpoint"),
    ):
        if names_in_doubt:
            raise CheckpointMismatchError(
                f"{where} does not fit this {item}: {names_in_doubt[0]}"
                f"{_more(names_in_doubt)} {what}. Give it the parameters that were saved. "
                "Nothing was changed"
            )
    if moved:
        name = moved[0]
        raise CheckpointMismatchError(
            f"{where}: {name}{_more(moved)} is in group {here[name]} of the {item}, saved was "
            f"group {there[name]}: with other groups it would train at another learning rate. "
            "Make the groups that were saved. Nothing was changed"
        )
    state: dict[int, Any] = {}
    for group, called in zip(live["param_groups"], groups, strict=True):
        for number, name in zip(group["params"], called, strict=True):
            if name in saved["state"]:
                state[number] = saved["state"][name]
    return {
        **saved["others"],
        "state": state,
        "param_groups": [
            {
                **saved["settings"][str(n)],
                **{k: group[k] for k in ("params", "param_names") if k in group},
            }
            for n, group in enumerate(live["param_groups"])
        ],
    }


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
