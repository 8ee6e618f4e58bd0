"""One region while a step runs: what it dropped, where its inputs are, how it comes back."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from actckpt.data.plan import Key
from actckpt.errors import ReplayError
from actckpt.rewriting.backward import at_end, backward_id, keeps_graph
from actckpt.rewriting.holders import Dropped, Generation, Kept, bits, is_resident
from actckpt.rewriting.program import RegionProgram
from actckpt.rewriting.record import Link, Span
from actckpt.rewriting.rewrite import Rewrite

# (region, the holder that backward asks, whether it is recomputed once more afterwards)
Replay = Callable[["Node", Dropped, bool], bool]


class Node:
    """A region between its forward pass and the last backward that needs it.

    Autograd's holders keep a node alive, a node its parent; a parent knows its children weakly. So
    whatever a region holds goes when nobody below it can ask for it any more.
    """

    __slots__ = (
        "__weakref__", "begin", "captured_to", "children", "drops", "end", "filled_in", "further",
        "holders", "input_storages", "inputs", "kept", "key", "owners", "parent", "program",
        "prunable", "random", "released", "replay", "resaved_in", "residents", "rewrite", "span",
        "top", "watching",
    )  # fmt: skip

    def __init__(
        self,
        program: RegionProgram,
        rewrite: Rewrite,
        span: Span,
        parent: Node | None,
        key: Key,
        residents: dict[int, torch.UntypedStorage],
        replay: Replay,
        top: bool,
    ) -> None:
        """
        Args:
            replay: runs the region's forward again; returns whether there were holders to fill.
            top: whether no region encloses it.
        """
        self.program = program
        self.key = key
        self.residents = residents
        self.replay = replay
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
        # what backward passes saved of what they were handed, in the order in which they did
        self.further: list[weakref.ref[Dropped]] = []
        # whether one did, of an outermost region: in it or in one inside it
        self.resaved_in = False
        self.kept: dict[tuple[int, int], Kept] = {}
        self.prunable = program.pruning is not None
        self.input_storages: set[int] = set()
        self.captured_to = 0
        self.drops = False
        # for the last time: what only a replay needs is gone
        self.released = False
        # after which it is recomputed once more: the last backward that it was for and the
        # generation, and the last that was asked to tell when it ends
        self.filled_in: tuple[int, Generation] = (-1, ())
        self.watching = -1
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
        holder = Dropped(self, number, tensor.shape, tensor.dtype)
        if self.rewrite.checking:
            holder.hash = bits(tensor)
        self.holders.append(weakref.ref(holder))
        return holder

    def resaved(self, holder: Dropped) -> None:
        """A backward has saved for a further one what it was handed."""
        self.further.append(weakref.ref(holder))
        self._outermost().resaved_in = True

    def _outermost(self) -> Node:
        node = self
        while node.parent is not None:
            node = node.parent
        return node

    def guard_captured(self, outputs: list[torch.Tensor]) -> None:
        """The caller may change in place what it was given: that must not go unnoticed."""
        captured = {k.tensor.untyped_storage()._cdata: k for k in self.kept.values()}
        for t in outputs:
            if is_resident(t, captured.keys()):
                captured[t.untyped_storage()._cdata].watch(t)

    def alive(self) -> Iterator[Dropped]:
        """Holders that autograd still has."""
        for ref in (*self.holders, *self.further):
            holder = ref() if ref is not None else None
            if holder is not None:
                yield holder

    def waiting(self, asker: Dropped, again: bool) -> dict[int, list[Dropped]]:
        """Holders that are to be filled, by number.

        Args:
            again: whether the others can be filled by a recomputation of their own.
        """
        backward = backward_id()
        found = defaultdict(list)
        for h in self.alive():
            if h.tensor is None and (h is asker or h.taken != backward):
                # outside of a backward nobody else is going to ask
                other = backward < 0 or h.generation != asker.generation
                if h is asker or not (again and other):
                    found[h.number].append(h)
        return found

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
        path: list[Node] = [self]
        while path[-1].inputs is None:
            parent = path[-1].parent
            if parent is None:
                raise self.error("its inputs are gone")
            path.append(parent)
        again = self.lasts() and (keeps_graph() or self._outlives(asker.generation))
        for node in reversed(path):
            if node.inputs is None:
                raise self.error("the enclosing recomputation did not reach it")
            if self.replay(node, asker, again) and not again:
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

    # ---- where it is recomputed once more

    def _outlives(self, generation: Generation) -> bool:
        """Whether the outermost region is asked for others than of this generation, too."""
        outermost = self._outermost()
        return outermost.resaved_in and outermost._holds_others(generation)

    def _holds_others(self, generation: Generation) -> bool:
        return any(h.generation != generation for h in self.alive()) or any(
            c._holds_others(generation) for c in self._inside()
        )

    def _inside(self) -> Iterator[Node]:
        """The regions directly inside that are still asked for."""
        for ref in self.children.values():
            child = ref()
            if child is not None:
                yield child

    def _await_another(self, path: list[Node], asker: Dropped) -> None:
        """Keeps what makes these regions again, and no more than that."""
        backward = backward_id()
        now = (backward, asker.generation)
        for node in path:
            if backward < 0:
                node.forget(asker)
            else:
                node.filled_in = now
                node._watch(backward)
        inner: Node | None = self
        while inner is not None and not inner.top and inner._is_through(now):
            inner.forget_inputs()
            inner = inner.parent

    def _is_through(self, now: tuple[int, Generation]) -> bool:
        """Whether this backward has been given all of a generation that is in the region."""
        return self.filled_in == now and all(c._is_through(now) for c in self._inside())

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
        self.further = [ref for ref in self.further if ref() is not None]
        for holder in self.alive():
            if holder is not but:
                holder.tensor = None
        if self.top:
            for child in self._inside():
                child.forget_inputs()
        else:
            self.forget_inputs()

    def forget_inputs(self) -> None:
        """Lets go of what the enclosing region's recomputation handed over, here and below."""
        self.inputs = None
        if self.parent is not None and self.parent.span is not self.span:
            self.span.calls[:] = [None] * len(self.span.calls)
        for child in self._inside():
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
