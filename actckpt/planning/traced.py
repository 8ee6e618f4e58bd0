"""The trace that a step is planned on: no guard fires, and the largest forward is drawn."""

from __future__ import annotations

import dataclasses
import logging

from torch import nn

from actckpt.data.graph import Graph
from actckpt.planning.several_backwards import single
from actckpt.tracing.draws import Draws, asks_for_draws, same_course, saved_bytes
from actckpt.tracing.hidden import without_links
from actckpt.tracing.step import Step
from actckpt.tracing.tracer import OTHERWISE, trace_step

logger = logging.getLogger("actckpt")

# guards that are tried the other way
_GUARDS = 8
DRAWN = (
    "the forward draws which of its parts run: planned by calls for the largest forward found, "
    "with all draws as they come, all high, and all low; one that is larger is planned for when it "
    "is seen"
)


def traced_step(model: nn.Module, step: Step) -> tuple[Step, Graph]:
    """The trace of a step as if no guard fires: no error that an answer of ours brought about."""
    first: Exception | None = None
    for _ in range(_GUARDS):
        try:
            return step, trace_step(model, single(step))
        except Exception as error:
            first = first or error
            otherwise = getattr(error, OTHERWISE, None)
            if otherwise is None:
                break
            step = dataclasses.replace(step, answers=otherwise)
    assert first is not None
    raise first


def largest_drawn(model: nn.Module, step: Step, graph: Graph) -> tuple[Step, Graph] | None:
    """The largest of the forwards that a step draws from; None where draws decide nothing.

    It is found with all draws as they come, all high, and all low. A smaller one leaves calls out,
    so that no region may span several.
    """
    if not asks_for_draws(graph):
        return None
    found = [(step, graph)]
    for draws in (Draws.HIGH, Draws.LOW):
        other = dataclasses.replace(step, draws=draws)
        try:
            found.append((other, trace_step(model, single(other))))
        except Exception as error:  # nothing runs, or what the model itself does not survive
            logger.debug("no forward under %s draws: %s", draws, error)
    if all(same_course(graph, other) for _, other in found):
        return None
    step, graph = max(found, key=lambda f: saved_bytes(f[1]))
    logger.info("actckpt: the forward draws what it runs; planning for %s draws", step.draws)
    return step, without_links(graph)
