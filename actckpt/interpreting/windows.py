"""Which calls of a forward only show an activation through another window.

Whoever is given such a window can tell by itself: it lies where the traced one lay, in the storage
that it was taken of. So these calls need not be compared, and may be spelled as they like.
"""

from __future__ import annotations

from functools import cached_property

from actckpt.data.graph import FunctionCall, Graph

# their results are windows that autograd knows the base of, or their argument itself; where one has
# to copy instead, its operations say so
_NAMES = frozenset(
    f"torch.{kind}{name}"
    for kind in ("Tensor.", "")
    for name in (
        "__getitem__", "broadcast_to", "chunk", "contiguous", "expand", "expand_as", "flatten",
        "float", "movedim", "narrow", "permute", "reshape", "select", "split", "squeeze",
        "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose", "type_as", "unbind",
        "unflatten", "unsqueeze", "view", "view_as",
    )
) | {"torch.nn.functional.dropout"}  # fmt: skip


class Windows:
    """The calls of a graph that only look, and what each of their results is a window of.

    Args:
        activations: storages that the forward makes.
    """

    def __init__(self, graph: Graph, activations: frozenset[int]) -> None:
        self.graph = graph
        self.activations = activations

    @cached_property
    def calls(self) -> dict[int, tuple[int, ...]]:
        """Those that only look at activations; of each result the wire that it shows."""
        found = {}
        for number, call in enumerate(self.graph.calls):
            if self._only_looks(call):
                shown = self._shown(call)
                if -1 not in shown:
                    found[number] = shown
        return found

    @cached_property
    def origins(self) -> dict[int, int]:
        """Wire of each of their results -> the wire that it is a window of, which none returns."""
        found: dict[int, int] = {}
        for number, shown in self.calls.items():
            for leaf, wire in enumerate(shown):
                found[self.graph.calls[number].wire + leaf] = found.get(wire, wire)
        return found

    def origin(self, wire: int) -> int:
        """The wire that another is a window of: itself, if none of these calls returns it."""
        return self.origins.get(wire, wire)

    def _only_looks(self, call: FunctionCall) -> bool:
        ops = self.graph.ops[call.first : call.last]
        return bool(call.outputs) and all(op.view for op in ops) and _name(call) in _NAMES

    def _shown(self, call: FunctionCall) -> tuple[int, ...]:
        """Of each result the wire of the argument that it shows, -1 for one that shows none."""
        given: dict[int, int] = {}
        for value, wire in zip(call.inputs, call.sources, strict=True):
            sid = self._storage(value)
            if wire >= 0 and sid in self.activations:
                given.setdefault(sid, wire)
        return tuple(given.get(self._storage(v), -1) for v in call.outputs)

    def _storage(self, value: int) -> int:
        return self.graph.values[value].storage if value >= 0 else -1


def _name(call: FunctionCall) -> str:
    """The function that is called: the text begins with it, as a list's first item."""
    return call.text.removeprefix('["').partition('"')[0]
