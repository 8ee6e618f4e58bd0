"""Bytes by category over a step, sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from actckpt.data.brief import brief

MAX_SAMPLES = 400


class Living(NamedTuple):
    """Allocations of one operation in alike modules that live at an instant.

    ``where`` is the modules' path with a star for each number.
    """

    op: str
    where: str
    number: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Bytes by category over one predicted step, untouched and planned.

    Args:
        baseline: category -> level at each sample, from the first operation of the step to the
            last; categories stack in the order of the keys, lowest first.
        planned: the same under the plan; it may have another number of samples.
        baseline_s: predicted time at which each sample is taken; empty where it is not known.
        planned_s: the same under the plan.
        baseline_marks: phase -> where it begins, as a share of the samples in [0, 1].
        planned_marks: the same under the plan.
        baseline_running: what runs at each sample; empty where it is not known.
        planned_running: the same under the plan.
        baseline_living: the largest activations at each sample; empty where it is not known.
        planned_living: the same under the plan.
    """

    baseline: dict[str, tuple[int, ...]] = field(default_factory=dict)
    planned: dict[str, tuple[int, ...]] = field(default_factory=dict)
    baseline_s: tuple[float, ...] = ()
    planned_s: tuple[float, ...] = ()
    baseline_marks: dict[str, float] = field(default_factory=dict)
    planned_marks: dict[str, float] = field(default_factory=dict)
    baseline_running: tuple[str, ...] = ()
    planned_running: tuple[str, ...] = ()
    baseline_living: tuple[tuple[Living, ...], ...] = ()
    planned_living: tuple[tuple[Living, ...], ...] = ()

    __repr__ = brief

    @classmethod
    def downsampled(
        cls,
        baseline: Mapping[str, Sequence[int]],
        planned: Mapping[str, Sequence[int]],
        *,
        baseline_s: Sequence[float] = (),
        planned_s: Sequence[float] = (),
        baseline_marks: Mapping[str, float] | None = None,
        planned_marks: Mapping[str, float] | None = None,
    ) -> Timeline:
        """A timeline of at most 400 samples that keeps both peaks."""
        picked = instants(baseline), instants(planned)
        return cls(
            _picked(baseline, picked[0]),
            _picked(planned, picked[1]),
            tuple(float(baseline_s[i]) for i in picked[0]) if baseline_s else (),
            tuple(float(planned_s[i]) for i in picked[1]) if planned_s else (),
            dict(baseline_marks or {}),
            dict(planned_marks or {}),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timeline:
        """The timeline of a report that `Report.to_json` wrote."""
        return cls(
            _levels(data["baseline"]),
            _levels(data["planned"]),
            tuple(data["baseline_s"]),
            tuple(data["planned_s"]),
            dict(data["baseline_marks"]),
            dict(data["planned_marks"]),
            # reports of before have none of these
            tuple(data.get("baseline_running", ())),
            tuple(data.get("planned_running", ())),
            _living(data.get("baseline_living", ())),
            _living(data.get("planned_living", ())),
        )


def instants(levels: Mapping[str, Sequence[int]]) -> list[int]:
    """The samples of a timeline: the highest instant of each of at most 400 equal spans."""
    totals = [sum(at) for at in zip(*levels.values(), strict=True)]
    count = min(len(totals), MAX_SAMPLES)
    picked = []
    for i in range(count):
        bucket = range(i * len(totals) // count, (i + 1) * len(totals) // count)
        picked.append(max(bucket, key=totals.__getitem__))
    return picked


def _picked(
    levels: Mapping[str, Sequence[int]], instants: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    # every category is read at the same instants, so that their sum is a real level
    return {name: tuple(int(level[i]) for i in instants) for name, level in levels.items()}


def _levels(data: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(level) for name, level in data.items()}


def _living(data: Sequence[Sequence[Sequence[Any]]]) -> tuple[tuple[Living, ...], ...]:
    return tuple(tuple(Living(*living) for living in at) for at in data)
