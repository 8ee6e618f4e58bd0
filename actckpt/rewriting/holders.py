"""What autograd holds in place of the tensors that a region would have saved."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Protocol

import torch
from torch import nn

from actckpt.errors import ReplayError
from actckpt.rewriting.backward import backward_id, keeps_graph
from actckpt.rewriting.saved_view import SavedView

CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation: {what} was saved at version {saved} and is now at version {found}"
)


class Kept:
    """A saved tensor that stays resident; refuses to be read after an in-place change."""

    __slots__ = ("guard", "tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        # not the output of an operation itself: that would be a reference cycle
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.guard = self.tensor  # an alias counts the same versions
        self.version = tensor._version

    def watch(self, tensor: torch.Tensor) -> None:
        """Takes the version from ``tensor``, an alias, from now on.

        For a tensor caught below autograd, whose own versions nobody counts.
        """
        self.guard = tensor.detach()
        self.version = tensor._version

    def is_changed(self) -> bool:
        """Whether it was changed in place since it was saved."""
        return self.guard._version != self.version

    def get(self) -> torch.Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was changed in place since it was saved, as autograd would say.
        """
        if self.is_changed():
            what = f"a {tuple(self.tensor.shape)} tensor"
            raise RuntimeError(
                CHANGED.format(what=what, saved=self.version, found=self.guard._version)
            )
        return self.tensor


# Of which graph a saved tensor is: () of the forward's, (b,) of the one that backward b made of it
# where gradients have a graph themselves, (b, c) of what backward c made of that, and so on. A
# backward goes through one after the other, and each of them is recomputed for by itself.
Generation = tuple[int, ...]


class Remaking(Protocol):
    """What makes a dropped tensor again: a region or a burst."""

    @property
    def label(self) -> str: ...

    def recompute(self, asker: Dropped) -> None: ...

    def lasts(self) -> bool: ...

    def resaved(self, holder: Dropped) -> None: ...

    def error(self, found: str) -> ReplayError: ...


class Dropped:
    """A saved tensor that is recomputed when backward first asks for one of its region.

    It stays until autograd releases this holder; where the graph is kept for another backward, only
    until it has been handed out, and is recomputed again.
    """

    __slots__ = (
        "__weakref__", "dtype", "generation", "hash", "node", "number", "shape", "taken", "tensor",
        "version", "view",
    )  # fmt: skip

    def __init__(
        self,
        node: Remaking,
        number: int,
        shape: torch.Size,
        dtype: torch.dtype,
        generation: Generation = (),
        view: SavedView | None = None,
    ) -> None:
        """
        Args:
            number: which of its region's saved tensors it is; of a burst's, the traced value.
            shape, dtype: of the tensor, or of the one that ``view`` is of.
            generation: of which graph; see `Generation`.
        """
        self.node = node
        self.number = number
        self.shape = shape
        self.dtype = dtype
        # of the bits that must come back; None where they are not compared
        self.hash: torch.Tensor | None = None
        self.generation = generation
        self.view = view
        self.tensor: torch.Tensor | None = None
        self.version = 0
        # the last backward that was handed it, of those that keep their graph
        self.taken = -1

    def fill(self, tensor: torch.Tensor) -> None:
        """The recomputation has made it again.

        Raises:
            ReplayError: it is laid out otherwise than the first time, and a view was saved.
        """
        found = tensor.detach()
        if self.view is not None:
            if not self.view.is_of(tensor):
                raise self.node.error("a tensor of which a view was saved is laid out otherwise")
            found = self.view.look(found)
        self.tensor = found
        self.version = tensor._version

    def check(self) -> None:
        """Raises what autograd would if the forward changes in place what it had saved.

        Raises:
            RuntimeError: the forward did so, in the recomputation as before.
        """
        if self.tensor is not None and self.tensor._version != self.version:
            what = f"a {tuple(self.shape)} tensor of {self.node.label}"
            raise RuntimeError(
                CHANGED.format(what=what, saved=self.version, found=self.tensor._version)
            )

    def again(self, backward: int, view: SavedView | None) -> Dropped:
        """A holder for what ``backward`` saves of the same tensor, for a further one."""
        generation = (*self.generation, backward)
        return Dropped(self.node, self.number, self.shape, self.dtype, generation, view)

    def get(self) -> torch.Tensor:
        """The tensor, recomputed if need be.

        Raises:
            ReplayError: the recomputation did not produce it.
        """
        found = self.tensor
        if found is None:
            self.node.recompute(self)
            found = self.tensor
            if found is None:
                raise self.node.error("the recomputation ended before this tensor was made")
        if keeps_graph() and self.node.lasts():
            self.tensor = None
            self.taken = backward_id()
        return found


def verify(holders: Iterable[Dropped]) -> None:
    """Looks at what was made again, bit by bit where the forward noted the bits.

    Raises:
        ReplayError: other values.
        RuntimeError: the forward changes in place what it had saved.
    """
    for h in holders:
        h.check()
        if h.hash is not None and h.tensor is not None:
            again = bits(h.tensor)
            if again is not None and not torch.equal(again, h.hash):
                raise h.node.error(
                    f"a saved {tuple(h.shape)} {h.dtype} tensor came back with other values"
                )
            h.hash = None


def is_resident(tensor: torch.Tensor, storages: Container[int]) -> bool:
    """Whether a tensor lies in one of ``storages`` (addresses): saving it costs nothing."""
    return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in storages


def is_parameter(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one: saving it costs nothing."""
    if isinstance(tensor, nn.Parameter):
        return True
    base = tensor._base
    return base is not None and isinstance(base, nn.Parameter)


def is_seed(dtype: torch.dtype, numel: int) -> bool:
    """Whether a tensor may be the seed and offset that a fused attention kernel drew with.

    Without dropout nobody writes them on CUDA. Drawn with another seed, the attention's output,
    which is saved beside it, would tell.
    """
    return dtype in (torch.int64, torch.uint64) and numel <= 2


def bits(tensor: torch.Tensor) -> torch.Tensor | None:
    """An exclusive-or of the tensor's bits, or None where torch has none for it."""
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.is_complex():
        return None
    if tensor.dtype == torch.uint8:
        return None  # a fused kernel's workspace (oneDNN's LSTM), with bytes that nobody writes
    if tensor.is_cuda and is_seed(tensor.dtype, tensor.numel()):
        return None
    with torch.no_grad():
        try:
            return torch.hash_tensor(tensor.detach())
        except (RuntimeError, NotImplementedError):
            return None
