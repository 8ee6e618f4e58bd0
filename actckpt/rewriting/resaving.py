"""What autograd saves of recomputed tensors where gradients get a graph of their own.

With ``create_graph`` the nodes of a backward save for a further one, and among that is what they
were handed: left alone, everything that was recomputed would stay until that graph goes. While such
a node runs, a hook gives autograd another holder instead, of the same region or burst.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from actckpt.rewriting.backward import backward_id, keeps_graph
from actckpt.rewriting.holders import Dropped, Kept
from actckpt.rewriting.saved_view import Layout, SavedView
from actckpt.tracing.compiled import never_compiled

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]

# the saved-tensor hooks on top of this thread's, or None; None by a torch that does not tell
_top: Callable[[bool], Hooks | None] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)
_push: Callable[..., None] = torch._C._autograd._push_saved_tensors_default_hooks
_enabled: Callable[[], bool] = getattr(
    torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True
)


@never_compiled
def unpack(holder: Any) -> torch.Tensor:
    """The unpack hook of every region and burst."""
    found: torch.Tensor = holder.get()
    if torch.is_grad_enabled() and isinstance(holder, Dropped):
        _resave(holder, found)
    return found


def _resave(holder: Dropped, found: torch.Tensor) -> None:
    """What the running node saves of ``found`` is going to be recomputed, too."""
    backward = backward_id()
    node = torch._C._current_autograd_node()
    if backward < 0 or node is None or not (keeps_graph() and holder.node.lasts()):
        return
    resaving = _resaving(backward, node)
    if resaving is not None:
        with torch._C.DisableTorchFunction():
            resaving.note(holder, found)


def _resaving(backward: int, node: Any) -> Resaving | None:
    """The hook of the running node, which gets it now unless it has it.

    The engine runs each node under the hooks of where backward was called: one pushed here is gone
    with the node.
    """
    if _top is None or not _enabled():
        return None
    top = _top(False)
    if top is not None and isinstance(top[0], Resaving):
        if top[0].backward == backward:
            return top[0]
    elif top is not None and (top[1] is unpack or isinstance(node, torch._C._FunctionBase)):
        # a planned forward that is under way counts what it saves; and hooks that the user's own
        # Function has opened are closed in their order
        return None
    resaving = Resaving(backward, top)
    _push(resaving, unpack)
    return resaving


class _Handed(NamedTuple):
    """A recomputed tensor that the running node has been handed."""

    storage: weakref.ref[torch.UntypedStorage]
    holder: weakref.ref[Dropped]
    dtype: torch.dtype
    layout: Layout
    version: int


class Resaving:
    """The pack hook while one node of a backward runs. Autograd keeps it: it holds no tensor."""

    def __init__(self, backward: int, below: Hooks | None) -> None:
        """
        Args:
            backward: the running backward.
            below: the hooks that are asked for anything else.
        """
        self.backward = backward
        self._below = below
        self._handed: list[_Handed] = []

    def note(self, holder: Dropped, found: torch.Tensor) -> None:
        """The node has been handed ``found``."""
        if _is_plain(found):
            storage = weakref.ref(found.untyped_storage())
            layout = Layout.of(found)
            self._handed.append(
                _Handed(storage, weakref.ref(holder), found.dtype, layout, found._version)
            )

    def __call__(self, tensor: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            holder = self._again(tensor)
        if holder is not None:
            return holder
        if self._below is not None:
            pack, back = self._below
            return _Theirs(pack(tensor), back)
        return Kept(tensor)

    def _again(self, tensor: torch.Tensor) -> Dropped | None:
        """A holder for a tensor that is one that was handed out, or a view of one."""
        if not _is_plain(tensor):
            return None
        storage = tensor.untyped_storage()
        for handed in self._handed:
            if handed.storage() is not storage or handed.dtype != tensor.dtype:
                continue
            # autograd hands out an alias that counts its own versions, from 0
            holder = handed.holder()
            layout = Layout.of(tensor)
            if (
                holder is not None
                and tensor._version in (0, handed.version)
                and handed.layout.holds(layout)
            ):
                return self._made(holder, handed.layout, layout)
        return None

    def _made(self, of: Dropped, base: Layout, layout: Layout) -> Dropped:
        view = of.view
        if layout != base:
            offset = layout.offset - base.offset + (view.layout.offset if view else 0)
            stride = view.base_stride if view else base.stride
            view = SavedView(stride, Layout(layout.shape, layout.stride, offset))
        holder = of.again(self.backward, view)
        of.node.resaved(holder)
        return holder


class _Theirs:
    """What the hooks of somebody else made of a tensor."""

    __slots__ = ("_back", "_packed")

    def __init__(self, packed: Any, back: Callable[[Any], torch.Tensor]) -> None:
        self._packed = packed
        self._back = back

    def get(self) -> torch.Tensor:
        """The tensor."""
        return self._back(self._packed)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is nothing but a window on its storage."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor)
    )
