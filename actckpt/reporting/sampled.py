"""The timeline of a report: every operation of both arms, and the samples that are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from actckpt.data.graph import Category, Graph, Phase
from actckpt.data.profile import Profile
from actckpt.planning.dry_run import DryRun
from actckpt.profiler.lives import Life
from actckpt.reporting.living import WORKSPACE, largest_living, running, untouched_lives
from actckpt.reporting.timeline import Timeline, instants

# what activations are: made by the forward and there when backward begins; made again; the rest
SAVED, RECOMPUTED, TEMPORARIES = "saved", "recomputed", "temporaries"


def timeline_of(graph: Graph, dry: DryRun, profile: Profile) -> Timeline:
    """Both arms, sampled, with what runs and what lives at each sample."""
    n, m = len(graph.ops), len(dry.timeline)
    lives = untouched_lives(graph)
    baseline = _levels(lives, n, graph.forward_end)
    baseline[WORKSPACE] = [profile.costs[op.signature].workspace_bytes for op in graph.ops]
    planned = _levels(dry.lives, m, dry.starts.get(str(Phase.BACKWARD), m))
    planned[WORKSPACE] = [at.get(WORKSPACE, 0) for at in dry.timeline]
    names = [name for name in baseline if any(baseline[name]) or any(planned[name])]
    untouched = {name: baseline[name] for name in names}
    under_plan = {name: planned[name] for name in names}
    phases = [op.phase for op in graph.ops]
    times_s = [profile.costs[op.signature].time_s for op in graph.ops]
    timeline = Timeline.downsampled(
        untouched,
        under_plan,
        baseline_s=[0.0, *np.cumsum(times_s)][:n],
        planned_s=dry.times_s,
        baseline_marks={str(p): phases.index(p) / max(n, 1) for p in Phase if p in phases},
        planned_marks={p: at / max(m, 1) for p, at in dry.starts.items()},
    )
    # the very instants that were sampled
    untouched_at, planned_at = instants(untouched), instants(under_plan)
    untouched_runs = running(graph, [(i, op.name, False) for i, op in enumerate(graph.ops)])
    planned_runs = running(graph, dry.course)
    return dataclasses.replace(
        timeline,
        baseline_running=tuple(untouched_runs[i] for i in untouched_at),
        planned_running=tuple(planned_runs[i] for i in planned_at),
        baseline_living=largest_living(graph, lives, untouched_at),
        planned_living=largest_living(graph, dry.lives, planned_at),
    )


def _levels(lives: Sequence[Life], count: int, backward: int) -> dict[str, list[int]]:
    """category -> level when each operation had run, activations in three parts.

    Args:
        count: of operations.
        backward: number of the first operation of backward.
    """
    parts = [*(str(c) for c in Category if c is not Category.ACTIVATION)]
    changes = {
        name: np.zeros(count + 1, dtype=np.int64)
        for name in (*parts, SAVED, RECOMPUTED, TEMPORARIES)
    }

    def lived(name: str, first: int, last: int, size: int) -> None:
        if last > first:
            changes[name][first] += size
            changes[name][last] -= size

    for life in lives:
        end = count if life.died < 0 else min(life.died, count)
        born, since = min(life.born, end), min(life.since, end)
        if life.category is Category.ACTIVATION:
            since = end
        part = SAVED if life.born < backward < end else TEMPORARIES
        lived(RECOMPUTED if life.again else part, born, since, life.bytes)
        if life.category is not Category.ACTIVATION:
            lived(str(life.category), since, end, life.bytes)
    return {name: np.cumsum(level)[:count].tolist() for name, level in changes.items()}
