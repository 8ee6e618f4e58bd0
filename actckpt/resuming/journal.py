"""What was seen of every step of a run, kept beside its checkpoints and compared when steps are
made again.

A run is nearly always killed some steps after its last checkpoint. The one that resumes makes these
steps again, and here is seen whether they come out as they were.
"""

from __future__ import annotations

import logging
import platform
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.journal_file import Expected, read_expected
from actckpt.checkpoint.journal_lines import Again, Step, again_line, step_line
from actckpt.errors import CheckpointDifferenceError
from actckpt.resuming.batch_chain import BatchChain
from actckpt.resuming.journal_compare import Comparison, Difference, Verified
from actckpt.resuming.journal_pace import Pace
from actckpt.resuming.places import Places
from actckpt.resuming.progress import processes
from actckpt.resuming.random_digests import RandomDigests
from actckpt.resuming.resumed import DECISIVE, version_differences
from actckpt.resuming.weight_sample import UNDER_WAY, Sample, WeightSampler
from actckpt.versions import versions

logger = logging.getLogger("actckpt")

ON_DIFFERENCE = ("warn", "raise", None)


@dataclass(slots=True)
class _Made:
    """A step whose weights may still be on their way."""

    step: Step
    sample: Sample | None


class Journal:
    """The journal of one run.

    Args:
        modules: whose weights are sampled, by the names that begin their labels.
        objects: what the run was given, by name, which may lead to random generators.
        on_difference: "warn" or "raise", or None for no journal at all.
    """

    def __init__(
        self,
        places: Places,
        modules: Mapping[str, nn.Module],
        objects: Mapping[str, Any],
        on_difference: str | None,
    ) -> None:
        self._places = places
        self._writer = places.journal
        self._sampler = WeightSampler(modules)
        self._random = RandomDigests(objects)
        self._pace = Pace()
        self._warned = False
        self._on_difference = on_difference
        self._under_way: deque[_Made] = deque()
        self._comparison: Comparison | None = None
        # whether the journal's last branch is this run's
        self._continues = False
        self._versions: dict[str, str] = {}

    @property
    def verified(self) -> Verified:
        """As `actckpt.Checkpointer.verified`."""
        comparison = self._comparison
        if comparison is None:
            return Verified(0, None)
        return Verified(comparison.compared, comparison.difference)

    @property
    def _may_write(self) -> bool:
        return self._places.held and self._writer.writes

    # ---- a step

    def takes(self, step: int) -> bool:
        """Whether a step is to be taken down, or compared."""
        if self._on_difference is None:
            return False
        comparison = self._comparison
        if comparison is not None and not comparison.ended and comparison.expects(step):
            return True
        return self._may_write and self._pace.takes(step)

    def read(self, batches: BatchChain, step: int, batch: object) -> None:
        """A batch was read, which belongs to a step that is to be made."""
        if not self.takes(step):
            batches.pass_over()
            return
        begin = self._pace.now()
        batches.add(batch)
        self._pace.spent(begin)

    def stepped(
        self, step: int, batches: tuple[str, int] | None, metrics: Mapping[str, float]
    ) -> None:
        """An optimizer step was made.

        Args:
            batches: as `BatchChain.seen`.

        Raises:
            CheckpointDifferenceError: it, or one shortly before, came out otherwise than it had.
        """
        pace = self._pace
        pace.stepped(self._writer.spent_s)
        takes = self.takes(step)
        if takes or self._under_way:
            begin = pace.now()
            if takes:
                self._take(step, batches, metrics)
            self._settle()
            pace.spent(begin)

    def _take(
        self, step: int, batches: tuple[str, int] | None, metrics: Mapping[str, float]
    ) -> None:
        if len(self._under_way) == UNDER_WAY:
            self._under_way[0].sample = None  # its copies would be waited for
        if step % self._sampler.steps == 0:
            self._sampler.forget()
        try:
            random, sample = self._random.digests(step), self._sampler.sample(step)
        except Exception as error:  # whose tensors and generators these are, nobody knows
            random, sample = {}, None
            if not self._warned:
                self._warned = True
                logger.warning(
                    "actckpt: the journal cannot read this run's random states and weights: %r. "
                    "Training goes on; only batches and metrics of such steps are compared",
                    error,
                )
        texts = {name: repr(value) for name, value in metrics.items()}
        self._under_way.append(_Made(Step("", step, batches, random, texts, None), sample))

    def saved(self) -> None:
        """The state is being saved: a run that goes on from here looks for everything anew."""
        self._look_anew()

    def close(self) -> None:
        """Takes down what is under way.

        Raises:
            CheckpointDifferenceError: as `stepped`.
        """
        self._settle(wait=True)

    def _settle(self, *, wait: bool = False) -> None:
        """Takes down the steps whose weights have come, in order."""
        while self._under_way:
            made = self._under_way[0]
            if made.sample is not None and not made.sample.ready:
                if not wait:
                    return
                made.sample.wait()
            self._under_way.popleft()
            self._take_down(made.step, made.sample)

    def _take_down(self, step: Step, sample: Sample | None) -> None:
        if sample is not None:
            step = replace(step, weights=(sample.rotation, sample.digests()))
        comparison = self._comparison
        if comparison is None or comparison.ended:
            self._write(step)
            return
        there = self._continues and comparison.expects(step.step)
        difference = comparison.compare(step, [] if sample is None else sample.pieces)
        if difference is not None and self._on_difference == "raise":
            comparison.parted = True
            self._writer.pause()  # what is expected stays, for the next try
        elif difference is not None and comparison.parted:
            there = False
            self._writer.go_on()
        if not there:
            self._write(step)
        self._report(comparison, step.step, difference)

    def _write(self, step: Step) -> None:
        if self._may_write:
            self._writer.append(
                step.step, lambda b: step_line(replace(step, branch=b)), self._environment()
            )

    def _report(self, comparison: Comparison, step: int, difference: Difference | None) -> None:
        first, last = comparison.first, comparison.compared_last
        if comparison.ended and self._may_write:
            text = None if comparison.difference is None else str(comparison.difference)
            self._writer.append(
                step + 1, lambda b: again_line(Again(b, first, last, text)), self._environment()
            )
        if difference is not None:
            alone = all(what.startswith("metric ") for what in difference.differs)
            message = (
                f"{difference}. It was made again after the checkpoint of step {first - 1}: "
                + (
                    "all else came out as it was, and a metric that measures time says nothing"
                    if alone
                    else "the run that was resumed goes on otherwise than the one that was saved"
                )
            )
            if self._on_difference == "raise":
                raise CheckpointDifferenceError(
                    f"{message}. Nothing was saved of it; the step was counted",
                    step=difference.step,
                    differs=difference.differs,
                )
            logger.warning("actckpt: %s", message)
        if comparison.ended and not comparison.parted:
            but = f", but for {comparison.difference}" if comparison.difference else ""
            logger.info(
                "actckpt: steps %d to %d, made again, came out as they were (%d compared: %s)%s",
                first,
                last,
                comparison.compared,
                comparison.seen,
                but,
            )

    # ---- coming back

    def resumed(self, checkpoint: Checkpoint) -> str:
        """The run goes on from its newest checkpoint; returns why no step will be compared, or "".

        Steps that were made after it are expected to come again.
        """
        self._forget()
        if self._on_difference is None:
            return ""
        self._writer.flush()
        serial, after = checkpoint.manifest.serial, checkpoint.step
        expected = self._read(serial, after)
        here = self._environment()
        steps: dict[int, Step] = {}
        for number in sorted(expected.steps):
            found, step = expected.steps[number]
            if found != here:
                break
            steps[number] = step
        self._continues = bool(expected.branch) and expected.versions == here
        branch = expected.branch if self._continues else ""
        self._writer.come_back(branch, serial, after, torn=expected.torn)
        if steps:
            self._comparison = Comparison(steps)
        elif expected.steps:
            found, _ = expected.steps[min(expected.steps)]
            return (
                f"the {len(expected.steps)} steps that were made after it are not compared with "
                f"those to come: {'; '.join(version_differences(found, here, tuple(here)))}"
            )
        return ""

    def _read(self, serial: int, after: int) -> Expected:
        try:
            return read_expected(
                self._places.files, self._places.path, serial, after, self._writer.rank
            )
        except (OSError, EOFError) as error:
            logger.warning(
                "actckpt: the journal in %s cannot be read: %s. The steps after step %d are not "
                "compared when they are made again",
                self._places.path,
                error,
                after,
            )
            return Expected(torn=True)

    def restored(self, checkpoint: Checkpoint | None) -> str:
        """As `resumed`, of a run that was taken somewhere else: nothing that comes is compared.

        Args:
            checkpoint: None where only a part was put back.
        """
        self._forget()
        if self._on_difference is not None and checkpoint is None:
            self._writer.go_on()
        elif self._on_difference is not None and checkpoint is not None:
            self._writer.flush()
            self._writer.come_back("", checkpoint.manifest.serial, checkpoint.step, torn=True)
        return ""

    def _forget(self) -> None:
        self._comparison, self._continues = None, False
        self._under_way.clear()
        self._look_anew()

    def _look_anew(self) -> None:
        self._sampler.forget()
        self._random.forget()

    def _environment(self) -> dict[str, str]:
        """What digests can be compared within."""
        if not self._versions:
            found = versions()
            python = ".".join(platform.python_version_tuple()[:2])
            self._versions = {
                **{name: found[name] for name in DECISIVE if name in found},
                "python": python,
                "processes": str(processes()),
            }
        return self._versions
