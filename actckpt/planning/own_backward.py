"""What is said of a backward that runs forwards itself: no plan of the model recomputes in those.

A reversible net or a checkpoint wrapper of the user's own runs a module's forward once more from
the backward of its ``autograd.Function``. The forward of the model has ended then: what such a
module saves belongs to no stage of it. The module itself can be planned, as a model of its own.
"""

from __future__ import annotations

from actckpt.data.graph import Graph, Op, Phase

_SHOWN = 2


def ran_in_backward(graph: Graph, op: Op) -> bool:
    """Whether an operation is of a forward that the backward ran, or of that one's backward."""
    return bool(graph.in_backward) and op.phase is Phase.BACKWARD and op.owner < 0


def note_on_backward(graph: Graph) -> str:
    """What is not recomputed and what would be, for reports and errors; "" where nothing is so."""
    found = graph.in_backward
    if not found:
        return ""
    names = ", ".join(found[:_SHOWN])
    more = len(found) - _SHOWN
    names += f" and {more} more" if more > 0 else ""
    return (
        f"the backward runs forwards itself ({names}), and what they save is not recomputed. "
        "actckpt.optimize(module, None, policy='full') on each of these modules, in place of the "
        "model, recomputes inside them"
    )
