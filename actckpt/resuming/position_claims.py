"""Why what a resumed run reads may be another than what it would have read."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from actckpt.resuming.loaders import (
    Loader,
    is_indexed,
    is_known,
    is_streamed,
    samplers_of,
    source_of,
    sources_per_batch,
    workers_of,
    workers_persist,
)
from actckpt.resuming.rehearsal import rehearsed
from actckpt.resuming.sampler_states import SamplerStates
from actckpt.resuming.seeded_samples import draws_by_seed


def inexact(
    state: dict[str, Any], loader: Loader | None, step: int, samplers: SamplerStates
) -> list[str]:
    """The reasons, none where it is the same.

    Args:
        state: of a `DataPosition`.
        step: optimizer steps that had been made.
        samplers: of the loader.
    """
    if reason := state.get("unkept", "") or _unwatched(state, step):
        return [reason]
    if loader is None:
        return []
    found = [_of_persistence(state, loader)]
    if state["batch"] or state["epoch"]:
        found += [_of_workers(state, loader), _of_own_state(state, loader)]
        found += [_of_stream(state, loader), _of_rehearsal(state, loader, samplers)]
    return [reason for reason in found if reason]


def _of_rehearsal(state: dict[str, Any], loader: Any, samplers: SamplerStates) -> str:
    source = source_of(loader)
    if not is_indexed(source) or "loader" in state:
        return ""
    return rehearsed(source, samplers, state)


def _unwatched(state: dict[str, Any], step: int) -> str:
    """Of a version that did not watch loops."""
    if "unkept" in state or not step or state["batch"] or state["epoch"]:
        return ""
    return (
        f"{step} steps were made in a loop that was not run.steps(), with a version of actckpt "
        "that does not watch others: where it was in its data is not known"
    )


def _of_persistence(state: dict[str, Any], loader: Any) -> str:
    here, there = workers_persist(loader), state.get("persist")
    if there in (None, here):
        return ""
    return (
        f"the loader had persistent_workers={there}, has {here}: those that persist draw no seed "
        f"for an epoch, and what is drawn after that differs; pass persistent_workers={there}"
    )


def _of_workers(state: dict[str, Any], loader: Any) -> str:
    here, there = workers_of(loader), state["workers"]
    if None in (here, there):
        return ""
    if here and not getattr(loader, "in_order", True):
        return "the loader's workers bring batches as they come (in_order=False)"
    seen = state.get("seen") or state.get("between", {}).get("seen") or {}
    if here and here == there and seen.get("changed"):
        return (
            f"what the dataset keeps in {here} loader workers, where it had changed, was not "
            "saved: samples that depend on it differ; let them depend on their index alone"
        )
    if draws_by_seed(loader):
        return ""
    # new workers at the beginning of an epoch are seeded from states that were saved
    lasting = state["batch"] > 0 or state.get("between", {}).get("reused", False)
    if here != there:
        what = f"the loader had {there} workers, has {here}"
    elif is_streamed(source_of(loader)) and not state.get("start", {"reused": True})["reused"]:
        return ""  # the same workers read the same again, and are then where they were
    elif here and lasting:
        if seen and not seen["drew"] and _take_turns(state, loader, seen):
            return ""
        drew = ", which had drawn," if seen.get("drew") else ""
        what = f"the random states of {here} loader workers{drew} were not saved"
    else:
        return ""
    return (
        f"{what}: what the dataset draws there, if anything, differs; wrap it in "
        "actckpt.SeededSamples"
    )


def _take_turns(state: dict[str, Any], loader: Any, seen: dict[str, Any]) -> bool:
    """Whether new workers will read what those before would have read, to the end of the run.

    Those that persist begin the next epoch with the first of them again. So those that begin now
    do in the middle of this one, where the first may have another number.
    """
    if not (workers_persist(loader) and state["batch"]):
        return True
    ours = seen.get("offset", 0) + state["batch"] * sources_per_batch(loader)
    return bool((ours - seen.get("offset_after", 0)) % loader.num_workers == 0)


def _of_own_state(state: dict[str, Any], loader: Any) -> str:
    if "loader" not in state:
        return ""
    source = source_of(loader)
    if is_indexed(source) and all(map(is_known, samplers_of(source))):
        return ""
    if isinstance(source, DataLoader) and is_streamed(source):
        return (
            f"{type(loader).__name__}'s own state over a stream may lose shuffle buffers and "
            "shorten epochs; what it brings back cannot be compared"
        )
    return (
        f"the place is what {type(loader).__name__}.state_dict() says; what follows it cannot be "
        "compared with what would have followed"
    )


def _of_stream(state: dict[str, Any], loader: Any) -> str:
    if state.get("draws"):
        return (
            "what the loader reads is drawn from the process's random states while it is read: its "
            "order cannot be replayed. Give it a generator of its own, or a seed"
        )
    omitted = state.get("digest", {}).get("omitted")
    if omitted:
        return f"the order cannot be compared: {omitted}"
    return ""
