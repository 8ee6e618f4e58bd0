"""What a data loader is made of: its source, samplers, generators, epochs and workers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.seeded_samples import dataset_layers

Loader = Iterable[Any]

# samplers of these draw from their generators and the global ones alone
_KNOWN = ("torch", "torchdata", "accelerate", "builtins")


def source_of(loader: Any) -> Any:
    """The loader that one of accelerate's reads from; of any other, itself."""
    source = getattr(loader, "__dict__", {}).get("base_dataloader")
    return source if isinstance(source, DataLoader) else loader


def is_indexed(loader: Loader | None) -> bool:
    """Whether it is a DataLoader that reads a dataset by a sampler's indices."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def is_streamed(loader: Loader | None) -> bool:
    """Whether it is a DataLoader over a dataset that cannot be indexed."""
    return isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)


def is_reused(loader: Any) -> bool:
    """Whether the loader has begun an epoch before, in workers that persist.

    Such a loader draws no new seed for an epoch.
    """
    return (
        getattr(loader, "_iterator", None) is not None
        and getattr(loader, "persistent_workers", True)
        and bool(workers_of(loader))
    )


def own_state_of(loader: Any) -> Stateful | None:
    """The loader, if it keeps a position of its own that cannot be replayed from outside.

    A DataLoader's order can be drawn again, and compared with what it was; so its own state is
    asked for only where its dataset keeps some.
    """
    source = source_of(loader)
    if isinstance(source, DataLoader) and not (
        isinstance(source, Stateful) and is_indexed(source) and isinstance(source.dataset, Stateful)
    ):
        return None
    return loader if isinstance(loader, Stateful) else None


def samplers_of(loader: Any) -> list[Any]:
    """The samplers that a loader draws from, and those that they draw from."""
    found: list[Any] = []
    waiting = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    while waiting:
        sampler = waiting.pop(0)
        if sampler is None or any(sampler is known for known in found):
            continue
        found.append(sampler)
        attributes = getattr(sampler, "__dict__", {})
        waiting += [attributes.get("sampler"), attributes.get("batch_sampler")]
    return found


def index_sampler_name(loader: Any) -> str:
    """The attribute of the sampler whose draws are batches."""
    return "batch_sampler" if loader.batch_sampler is not None else "sampler"


def is_known(sampler: Any) -> bool:
    """Whether a sampler keeps no state but generators and what it was told."""
    return type(sampler).__module__.partition(".")[0] in _KNOWN


def seeds_itself(loader: Any) -> bool:
    """Whether a sampler makes its generator when a pass begins, from a seed (accelerate's)."""
    return any(
        type(sampler).__name__ == "SeedableRandomSampler" and sampler.generator is None
        for sampler in samplers_of(loader)
    )


def samplers_by_epoch(loader: Any) -> list[Any]:
    """The samplers whose order depends on an epoch that they are told (DistributedSampler)."""
    return [s for s in samplers_of(loader) if _is_told(s)]


def by_epoch(loader: Any) -> Any:
    """The outermost of those, or None."""
    return next(iter(samplers_by_epoch(loader)), None)


def datasets_by_epoch(loader: Any) -> list[Any]:
    """The datasets whose samples depend on an epoch that they are told."""
    return [d for d in dataset_layers(loader) if _is_told(d)]


def _is_told(item: Any) -> bool:
    return hasattr(item, "set_epoch") and isinstance(getattr(item, "epoch", None), int)


def generators_given(loader: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers were given, each once."""
    owners = [loader, *samplers_of(loader)]
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def length_of(loader: object) -> int | None:
    """Batches of an epoch, where they are known."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def workers_of(loader: Any) -> int | None:
    """Processes that read the data beside this one; None where no data is read."""
    return None if loader is None else getattr(loader, "num_workers", 0)


def workers_persist(loader: Any) -> bool | None:
    """Whether workers that read one epoch read the next one too, and no seed is drawn for them."""
    return None if loader is None else bool(getattr(source_of(loader), "persistent_workers", False))


def facts_of(loader: Any) -> dict[str, Any]:
    """What the order of a DataLoader's samples depends on, besides random states."""
    if not isinstance(loader, DataLoader):
        return {}
    return {
        "samples": length_of(loader.dataset),
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "sampler": type(loader.sampler).__qualname__,
        "batch_sampler": type(loader.batch_sampler).__qualname__,
    }


def is_dispatcher(loader: Any) -> bool:
    """Whether it is one of accelerate's that reads for all processes."""
    return hasattr(loader, "_fetch_batches")


def sources_per_batch(loader: Any) -> int:
    """Batches of the source that make one of the loader's: accelerate's dispatcher joins some."""
    if not is_dispatcher(loader) or loader.split_batches or loader.submesh_tp:
        return 1
    return int(loader.state.num_processes)
