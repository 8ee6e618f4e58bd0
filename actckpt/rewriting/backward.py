"""Which backward pass is running, and whether its graph is going to be asked again."""

from __future__ import annotations

from collections.abc import Callable

import torch

# the number of the running backward, which no other has; -1 outside of one
backward_id: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: 0)


def _is_outside() -> bool:
    return backward_id() < 0


# whether the running backward keeps its graph (``retain_graph``, ``create_graph``); True outside of
# one. By a torch that does not tell, one backward is taken to be all that a graph is for
keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", _is_outside
)


def at_end(do: Callable[[], None]) -> None:
    """Calls ``do`` once the running backward has ended; never if that raises."""
    torch.autograd.Variable._execution_engine.queue_callback(do)
