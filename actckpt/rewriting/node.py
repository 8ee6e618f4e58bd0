"""One region while a step runs: what it dropped, where its inputs are, how it comes back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from actckpt.errors import ReplayError
from actckpt.plan import Key
from actckpt.rewriting.backward import at_end, backward_id, keeps_graph
from actckpt.rewriting.holders import Dropped, Kept, is_resident
from actckpt.rewriting.program import RegionProgram

if TYPE_CHECKING:
    from actckpt.rewriting.record import CallRecord
    from actckpt.rewriting.rewrite import Rewrite

Link = tuple[int, int]


class Span:
    """The recorded calls of a chain of sibling stages, shared by every region that spans some.

    ``calls[i]`` is None while only an enclosing region's replay could provide the arguments.
    ``moved`` are the calls that were seen to move torch's generators, ``draws`` those of them that
    did not find the generators where the call before left them.
    """

    __slots__ = ("calls", "draws", "last_use", "moved", "pending", "produced")

    def __init__(self) -> None:
        self.calls: list[CallRecord | None] = []
        self.last_use: dict[Link, int] = {}
        self.produced: dict[int, tuple[Any, int, int, int]] = {}
        self.pending = 0
        self.moved: set[int] = set()
        self.draws: set[int] = set()

    def source(self, tensor: torch.Tensor) -> Link | None:
        """Which output of which call ``tensor`` is: the same object at the same version."""
        found = self.produced.get(id(tensor))
        if found is None or found[0]() is not tensor or found[3] != tensor._version:
            return None
        return found[1], found[2]

    def enter_outputs(self, position: int, outputs: list[torch.Tensor]) -> None:
        """Remembers (weakly) what call ``position`` returned."""
        for leaf, t in enumerate(outputs):
            self.produced[id(t)] = (weakref.ref(t), position, leaf, t._version)


class Node:
    """A region between its forward pass and the last backward that needs it.

    Autograd's holders keep a node alive, a node its parent; a parent knows its children weakly. So
    whatever a region holds goes when nobody below it can ask for it any more.
    """

    __slots__ = (
        "__weakref__", "begin", "captured_to", "children", "drops", "end", "filled_in", "holders",
        "input_storages", "inputs", "kept", "key", "owners", "parent", "program", "prunable",
        "random", "released", "residents", "rewrite", "span", "top", "watching",
    )  # fmt: skip

    def __init__(
        self,
        program: RegionProgram,
        rewrite: Rewrite,
        span: Span,
        parent: Node | None,
        key: Key,
        residents: dict[int, torch.UntypedStorage],
        top: bool,
    ) -> None:
        self.program = program
        self.key = key
        self.residents = residents
        self.rewrite = rewrite
        self.span = span
        self.parent = parent
        self.begin = self.end = len(span.calls)
        # links from before the region; None until known. A top region's tensors are in the calls
        self.inputs: dict[Link, torch.Tensor] | None = {} if top else None
        self.top = top
        self.random: Any = None
        self.owners: list[Any] = []
        self.children: dict[tuple[int, Key], Any] = {}
        self.holders: list[Any] = []
        self.kept: dict[tuple[int, int], Kept] = {}
        self.prunable = program.pruning is not None
        self.input_storages: set[int] = set()
        self.captured_to = 0
        self.drops = False
        # for the last time: what only a replay needs is gone
        self.released = False
        # backward passes that keep their graph: the last that filled it, and was asked to tell
        # when it ends
        self.filled_in = self.watching = -1
        if parent is not None:
            parent.children[(program.index, key)] = weakref.ref(self)

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"region {self.program.label}"

    def packer(self) -> Callable[[torch.Tensor], Any]:
        """The pack hook of this region. Autograd keeps it, which must not keep the region."""
        node = weakref.ref(self)

        def pack(tensor: torch.Tensor) -> Any:
            found = node()
            assert found is not None  # it is open: the run holds it
            return found.pack(tensor)

        return pack

    def pack(self, tensor: torch.Tensor) -> Any:
        """Hook: autograd saves ``tensor`` under this region."""
        if is_resident(tensor, self.residents):
            return Kept(tensor)
        number = len(self.holders)
        if number in self.program.keep:
            kept = Kept(tensor)
            self.holders.append(None)
            pruning = self.program.pruning
            if self.prunable and pruning is not None and number in pruning.reads:
                # a replay reads it, perhaps after its own backward has let go of it
                self.kept[(number, -1)] = kept
            return kept
        if is_resident(tensor, self.input_storages):
            self.holders.append(None)
            return Kept(tensor)
        if not self.drops:
            self.drops = True
            self.span.pending += 1
        holder = Dropped(self, tensor, self.rewrite.checking)
        self.holders.append(weakref.ref(holder))
        return holder

    def guard_captured(self, outputs: list[torch.Tensor]) -> None:
        """The caller may change in place what it was given: that must not go unnoticed."""
        captured = {k.tensor.untyped_storage()._cdata: k for k in self.kept.values()}
        for t in outputs:
            if is_resident(t, captured.keys()):
                captured[t.untyped_storage()._cdata].watch(t)

    def waiting(self, asker: Dropped, again: bool) -> dict[int, Dropped]:
        """Holders that autograd still has and that are to be filled, by number."""
        backward = backward_id()
        alive = ((n, ref()) for n, ref in enumerate(self.holders) if ref is not None)
        empty = {n: h for n, h in alive if h is not None and h.tensor is None}
        if again and backward < 0:  # nobody else is going to ask
            return {n: h for n, h in empty.items() if h is asker}
        return {n: h for n, h in empty.items() if h is asker or h.taken != backward}

    def lasts(self) -> bool:
        """Whether it can be recomputed once more after the next time."""
        node: Node | None = self
        while node is not None:
            if node.released:
                return False
            node = node.parent
        return True

    def recompute(self, asker: Dropped) -> None:
        """Fills every waiting holder, through the nearest enclosing region that has its inputs.

        Raises:
            ReplayError: the forward did not do again what it had done.
        """
        from actckpt.rewriting.replay import replay

        path: list[Node] = [self]
        while path[-1].inputs is None:
            parent = path[-1].parent
            if parent is None:
                raise self.error("its inputs are gone")
            path.append(parent)
        again = keeps_graph() and self.lasts()
        for node in reversed(path):
            if node.inputs is None:
                raise self.error("the enclosing recomputation did not reach it")
            if replay(node, asker, again) and not again:
                node.filled()
        if again:
            self._await_another(path, asker)

    def filled(self) -> None:
        """Lets go of what only a replay needed."""
        self.released = True
        self.kept.clear()
        if not self.top:
            self.inputs = {}
        self.span.pending -= 1
        if self.span.pending <= 0:
            for call in self.span.calls:
                if call is not None:
                    call.release()

    # ---- where the graph is kept

    def _await_another(self, path: list[Node], asker: Dropped) -> None:
        """Keeps what makes these regions again, and no more than that."""
        backward = backward_id()
        for node in path:
            if backward < 0:
                node.forget(asker)
            else:
                node.filled_in = backward
                node._watch(backward)
        inner: Node | None = self
        while inner is not None and not inner.top and inner._is_through(backward):
            inner.forget_inputs()
            inner = inner.parent

    def _is_through(self, backward: int) -> bool:
        """Whether this backward has been given all that is in the region."""
        children = (ref() for ref in self.children.values())
        return self.filled_in == backward and all(
            c._is_through(backward) for c in children if c is not None
        )

    def _watch(self, backward: int) -> None:
        """What this backward did not take goes when it has ended."""
        if self.watching == backward:
            return
        self.watching = backward
        found = weakref.ref(self)

        def ended() -> None:
            node = found()
            if node is not None and node.lasts():
                node.forget(None)

        at_end(ended)

    def forget(self, but: Dropped | None) -> None:
        """Lets go of what was made again, which can be made once more."""
        for ref in self.holders:
            holder = ref() if ref is not None else None
            if holder is not None and holder is not but:
                holder.tensor = None
        if self.top:
            for child_ref in self.children.values():
                child = child_ref()
                if child is not None:
                    child.forget_inputs()
        else:
            self.forget_inputs()

    def forget_inputs(self) -> None:
        """Lets go of what the enclosing region's recomputation handed over, here and below."""
        self.inputs = None
        if self.parent is not None and self.parent.span is not self.span:
            self.span.calls[:] = [None] * len(self.span.calls)
        for ref in self.children.values():
            child = ref()
            if child is not None:
                child.forget_inputs()

    def error(self, found: str) -> ReplayError:
        """The error for a recomputation that went astray."""
        return ReplayError(
            f"region {self.program.label} could not be recomputed: {found}.\n"
            "A recomputation runs the region's forward again and must do exactly what it did "
            "before. Likely causes: a cache or attribute that the forward changes, a branch or a "
            "routing that depends on something outside the arguments, an operation that is not "
            "deterministic (try torch.use_deterministic_algorithms(True)).\n"
            "What works: actckpt.revert(model), or a policy without this region."
        )
