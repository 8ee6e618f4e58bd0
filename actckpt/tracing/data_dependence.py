"""Errors of steps that ask for values which only a real step has: the line, and what would work."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch

from actckpt.errors import TraceError

_LIBRARIES = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/")
_NUMBERS = (
    "numpy() is not supported for tensor subclasses", "data is not allocated yet", "FakeTensor",
)  # fmt: skip
_EXPERTS = re.compile(r"expert|moe\b|mixture|router", re.IGNORECASE)


def user_line(error: BaseException) -> str:
    """``file:line, in function`` of the last frame that is neither torch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if not f.filename.startswith(_LIBRARIES)]
    if not outside:
        return "unknown line"
    f = outside[-1]
    return f"{f.filename}:{f.lineno}, in {f.name}: {f.line}"


def asks_for_numbers(error: BaseException) -> bool:
    """Whether code outside of torch wanted the numbers of a fake tensor, as NumPy and SciPy do."""
    if not isinstance(error, (RuntimeError, TypeError, ValueError)):
        return False
    return any(words in str(error) for words in _NUMBERS)


def of_forward(error: BaseException, path: str, kind: str, apart: str) -> TraceError:
    """The error for a forward that asks for a value.

    Args:
        path: of the module whose forward was running, "" for the model.
        kind: its class.
        apart: the largest module that has been run by then, "" if there is none.
    """
    line = user_line(error)
    works = "make the branch or the shape independent of the data"
    if _EXPERTS.search(f"{path} {kind} {line}"):
        works += (
            " (for mixtures of experts a grouped or batched implementation, such as Hugging Face's "
            'experts_implementation="grouped_mm")'
        )
    if apart:
        works = (
            f"actckpt.optimize(model.{apart}, ...): it had run by then, and asks for none; what "
            f"is around it is then not bounded. Or {works}"
        )
    return _error(error, f"the forward of {path or 'the model'}", line, works)


def of_loss(error: BaseException) -> TraceError:
    """The error for a ``loss_fn`` that asks for a value."""
    return _error(
        error,
        "the loss (loss_fn)",
        user_line(error),
        "keep the number out of loss_fn (read it after the step, to log it), and a choice in "
        "tensors: torch.where(condition, a, b). Or leave loss_fn out: then the step is planned "
        "from the model's outputs on, and what the loss takes is not bounded",
    )


def of_rest(error: BaseException, what: str) -> TraceError:
    """The error for what comes after forward and loss: ``what`` of the step asks for a value."""
    return _error(
        error, what, user_line(error), "make the branch or the shape independent of the data"
    )


def _error(error: BaseException, where: str, line: str, works: str) -> TraceError:
    return TraceError(
        f"{where} depends on the values of activations, which fake tensors do not have:\n"
        f"  {line}\n  ({type(error).__name__}: {str(error).splitlines()[0]})\n"
        f"What works: {works}."
    )
