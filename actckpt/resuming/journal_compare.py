"""Steps that are made again, compared with what a journal says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from actckpt.checkpoint.journal_lines import Step
from actckpt.resuming.weight_sample import UNREAD, Piece

# weights that one message names
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """A step that did not come out as it had.

    Args:
        differs: "batch", "random state torch", "metric loss", "weights of layers.0.bias": what of
            it did.
        found: the same with values, for messages.
    """

    step: int
    differs: tuple[str, ...]
    found: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.found}"


class Verified(NamedTuple):
    """What was seen of the steps that a resumed run made again.

    Args:
        steps: how many were compared so far.
        difference: the first that was found.
    """

    steps: int
    difference: Difference | None


class Comparison:
    """The steps between a checkpoint and the end of the process before, as they come again.

    Args:
        expected: by number.
    """

    def __init__(self, expected: Mapping[int, Step]) -> None:
        self._expected = expected
        # metrics that differed; they are said once
        self._metrics: set[str] = set()
        self._seen: set[str] = set()
        self.first = min(expected)
        self.last = max(expected)
        self.compared = 0
        self.compared_last = self.first - 1
        self.difference: Difference | None = None
        # whether the run is another from here on
        self.parted = False

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be compared."""
        return self.parted or self.compared_last >= self.last

    @property
    def seen(self) -> str:
        """What of the steps was compared."""
        order = ("batches", "random states", "metrics", "sampled weights")
        return ", ".join(what for what in order if what in self._seen) or "nothing"

    def expects(self, step: int) -> bool:
        """Whether there is something to compare a step with."""
        return not self.parted and step in self._expected

    def compare(self, found: Step, pieces: list[Piece]) -> Difference | None:
        """In what a step differs, where that is worth another word; None where it does not.

        A metric alone is no sign of another run, for it may be a measured time: the others are
        compared on, and of that metric no more is said.

        Args:
            pieces: of which the digests in ``found`` are.
        """
        self.compared_last = max(self.compared_last, found.step)
        if not self.expects(found.step):
            return None
        was = self._expected[found.step]
        self.compared += 1
        differences = dict(self._differences(was, found, pieces))
        if not differences:
            return None
        metrics = {name for name in differences if name.startswith("metric ")}
        self._metrics |= metrics
        self.parted = len(metrics) < len(differences)
        difference = Difference(found.step, tuple(differences), "; ".join(differences.values()))
        if self.difference is None:
            self.difference = difference
        return difference

    def _differences(
        self, was: Step, found: Step, pieces: list[Piece]
    ) -> Iterator[tuple[str, str]]:
        if was.batches and found.batches:
            self._seen.add("batches")
            if was.batches[1] != found.batches[1]:
                yield "batch", f"{was.batches[1]} batches, now {found.batches[1]}"
            elif was.batches[0] != found.batches[0]:
                yield "batch", f"the batch is another ({was.batches[0]}, now {found.batches[0]})"
        for name in [n for n in was.random if n in found.random]:
            self._seen.add("random states")
            if was.random[name] != found.random[name]:
                yield f"random state {name}", f"the random state of {name} is another"
        yield from self._of_metrics(was, found)
        yield from self._of_weights(was, found, pieces)

    def _of_metrics(self, was: Step, found: Step) -> Iterator[tuple[str, str]]:
        for name, here in found.metrics.items():
            if name not in was.metrics or name in self._metrics:
                continue
            self._seen.add("metrics")
            if was.metrics[name] != here:
                yield f"metric {name}", f"metric {name} was {was.metrics[name]}, is {here}"

    def _of_weights(self, was: Step, found: Step, pieces: list[Piece]) -> Iterator[tuple[str, str]]:
        if was.weights is None or found.weights is None or was.weights[0] != found.weights[0]:
            return
        names = []
        for number, piece in enumerate(pieces):
            at = slice(number * len(UNREAD), (number + 1) * len(UNREAD))
            there, here = was.weights[1][at], found.weights[1][at]
            if UNREAD in (there, here):
                continue
            self._seen.add("sampled weights")
            if there != here:
                names.append(str(piece))
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            text = f"weights of {', '.join(names[:_SHOWN])}{more}"
            yield text, f"{text} are others"
