"""Names of tensors that come from what a model was wrapped in when it was saved."""

from __future__ import annotations

from collections.abc import Collection

# what a wrapper keeps the model under -> (the wrapper, how the model inside is had)
_WRAPPERS = {
    "_orig_mod": ("torch.compile", "model._orig_mod"),
    "module": ("DistributedDataParallel or DataParallel", "model.module"),
}


def explain(live: Collection[str], saved: Collection[str]) -> str:
    """What wrapper makes all the difference between two sets of names, and what to pass; or "".

    Args:
        live: names of the tensors of what a Checkpointer was given.
        saved: those of a checkpoint.
    """
    if _unwrapped(live) != _unwrapped(saved) or len(_unwrapped(live)) != len(live):
        return ""
    said = []
    for component, (wrapper, inside) in _WRAPPERS.items():
        here, there = (_having(names, component) for names in (live, saved))
        if len(here) < len(there):
            said.append(
                f"names that were saved hold {component}. ({there[0]}), as in a model wrapped by "
                f"{wrapper}. Pass it wrapped as it was then"
            )
            if all(name.startswith(f"{component}.") for name in saved):
                said[-1] += (
                    ", or your own model under that name, "
                    f'torch.nn.ModuleDict({{"{component}": model}})'
                )
        elif len(here) > len(there):
            said.append(
                f"names of the model that was passed hold {component}. ({here[0]}): it is wrapped "
                f"by {wrapper}, and the one that was saved was not. Pass the model inside, {inside}"
            )
    return "; ".join(said)


def told_of(names: Collection[str]) -> str:
    """What names of a file say about how to load it; "" where they are a model's own."""
    for component, (wrapper, _) in _WRAPPERS.items():
        prefix = f"{component}."
        if names and all(name.startswith(prefix) for name in names):
            return (
                f"every name begins with {prefix}, as those of a model in {wrapper} do: load it "
                f'into that, or take the prefix off, {{k.removeprefix("{prefix}"): v for k, v in '
                "load_file(path).items()}"
            )
    return ""


def without_wrappers(names: Collection[str]) -> dict[str, str]:
    """What each name would be if nothing were wrapped.

    A model may have parts of its own that are called ``module``: that counts only where all names
    begin with it. No model has a part called ``_orig_mod``.
    """
    found = {n: ".".join(p for p in n.split(".") if p != "_orig_mod") for n in names}
    while found and all(name.startswith("module.") for name in found.values()):
        found = {old: new.removeprefix("module.") for old, new in found.items()}
    return found


def _unwrapped(names: Collection[str]) -> set[str]:
    return {".".join(p for p in name.split(".") if p not in _WRAPPERS) for name in names}


def _having(names: Collection[str], component: str) -> list[str]:
    return [name for name in names if component in name.split(".")]
