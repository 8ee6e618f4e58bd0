"""The place in the data, in a run of another number of processes than that which saved it."""

from __future__ import annotations

from typing import Any

from torch.utils.data.distributed import DistributedSampler

from actckpt.resuming.loaders import Loader, facts_of, is_indexed, length_of


def moved(
    position: dict[str, Any], loader: Loader | None, saved: int, here: int
) -> tuple[dict[str, Any], str]:
    """The position behind the same samples, and what of the data is another then.

    Where a DistributedSampler gives each process its part, batches of all processes together are
    of the same samples as long as they have the same size.

    Args:
        position: the state of a `DataPosition`.
        saved, here: processes.
    """
    distributed = is_indexed(loader) and isinstance(loader.sampler, DistributedSampler)  # type: ignore[union-attr]
    before = position["order"].get("batch_size")
    now = facts_of(loader).get("batch_size")
    if not distributed or not before or not now or "loader" in position:
        return position, "which process reads what of the data, and in which order"
    together_before, together_now = before * saved, now * here
    batch, over = divmod(position["batch"] * together_before, together_now)
    changed = {
        **position,
        "batch": batch,
        "batches": length_of(loader),
        "order": facts_of(loader),
    }
    if together_before == together_now:
        said = "which process reads what (batches of all together are of the same samples)"
    elif over:
        said = (
            f"batches of all together are of {together_now} samples, were of {together_before}: "
            f"{over} samples of this epoch come again"
        )
    else:
        said = f"batches of all together are of {together_now} samples, were of {together_before}"
    return changed, said
