"""What goes on from one save of many ranks to the next."""

from __future__ import annotations

from actckpt.sharded.planning import Holding, Planner


class Known:
    """What a rank knows of the saves before, and the coordinator of all ranks."""

    def __init__(self) -> None:
        self.holding = Holding()
        self.planner = Planner()
