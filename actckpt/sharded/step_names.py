"""Names for what the ranks of a run do together at a step, which each of them finds by itself."""

from __future__ import annotations

# a run that went back so far finds none of what was said then
_MOST = 10_000


class StepNames:
    """The n-th thing at a step has the same name on every rank.

    No count over the whole run: where one rank does once more what all are to do, the names after
    that step are the same again.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def next(self, step: int) -> str:
        """The name of what is done now, at this step once more."""
        count = self._counts.pop(step, 0)
        self._counts[step] = count + 1
        if len(self._counts) > _MOST:
            del self._counts[next(iter(self._counts))]
        return f"{step}.{count}"
