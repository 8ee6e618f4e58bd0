"""`torch.compile` beside plans: the user's own compiled functions, and our own that never are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C._dynamo import eval_frame

F = TypeVar("F", bound=Callable[..., Any])

# how far up the stack `is_compiled` looks for torch.compile
_FAR = 100


@contextmanager
def as_written() -> Iterator[None]:
    """Functions under `torch.compile` run as they are written for a while, compiled again after.

    Under a dispatch mode Dynamo would mark them as not to be compiled, for good, and refuse those
    with ``fullgraph=True`` from then on. The stance is the whole process's: compiled functions of
    other threads run as written meanwhile, too. (Torch's own fake tensors and dispatch modes import
    Dynamo, so nothing more is imported for this.)
    """
    with torch.compiler.set_stance("force_eager"):
        yield


def never_compiled(function: F) -> F:
    """The same function, which Dynamo neither compiles nor looks into, nor into what it calls.

    Compiled functions that it calls stay compiled. As `torch.compiler.disable`, but without a
    wrapper round every call, and without importing Dynamo.
    """
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = (
        "actckpt plans models for eager execution; to export one, call actckpt.revert(model) first"
    )
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(marked.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


def is_compiler_wrapper(model: nn.Module) -> bool:
    """Whether it is the module that `torch.compile` returns for a module."""
    return type(model).__module__ == "torch._dynamo.eval_frame"


def compiled_inside(model: nn.Module) -> list[str]:
    """Paths of the modules inside a model that are compiled by themselves."""
    return [
        path
        for path, m in model.named_modules()
        if path and (is_compiler_wrapper(m) or getattr(m, "_compiled_call_impl", None) is not None)
    ]


def is_compiled(model: nn.Module, *, calling: bool) -> bool:
    """Whether ``model.compile()`` was called, or `torch.compile` is calling it at this moment.

    Args:
        calling: looks for the latter on the stack.
    """
    if getattr(model, "_compiled_call_impl", None) is not None:
        return True
    if not calling or "torch._dynamo" not in sys.modules:
        return False
    frame = sys._getframe(1)
    for _ in range(_FAR):
        if frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return "compile" in frame.f_code.co_name
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
