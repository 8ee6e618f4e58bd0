"""Questions that a forward asks of values which only a real step has: whether something holds.

Most of them guard: an assertion about boxes, a codebook that is reset once some code was not used.
A step is planned as if no guard fires; one in which one does goes another way, as any forward that
changes from step to step.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch

aten = torch.ops.aten
# (number of the question, answer) where the usual one ended in an error
Answers = tuple[tuple[int, bool], ...]
# what is asked by an operation that returns no tensor
ASKING = {aten.equal.default, aten.allclose.default}
_EVERY = {aten.all.default, aten.all.dim, aten.all.dims}
_MADE_BY = "_actckpt_every"


def note_question(func: Any, out: Any) -> None:
    """Remembers of a truth value whether it is that of all elements of something."""
    if isinstance(out, torch.Tensor) and out.dtype is torch.bool and out.numel() == 1:
        out.__dict__[_MADE_BY] = func in _EVERY


class Guards:
    """The questions of one run on fake tensors, in order, and their answers."""

    def __init__(self, answers: Answers) -> None:
        self._told = dict(answers)
        self.given: list[bool] = []
        self.lines: list[str] = []

    def answer(self, tensor: torch.Tensor | None) -> bool:
        """Whether something holds: of all elements yes, else no, as long as that ends well."""
        usual = bool(tensor.__dict__.get(_MADE_BY)) if tensor is not None else False
        found = self._told.get(len(self.given), usual)
        self.given.append(found)
        self.lines.append(_asking_line())
        return found

    def otherwise(self) -> Answers | None:
        """The same answers but for the last of those not turned round yet; None if there is none.

        For a run that ended in an error: a guard has fired.
        """
        for number in reversed(range(len(self.given))):
            if number not in self._told:
                told = {**self._told, number: not self.given[number]}
                return tuple(sorted(told.items()))
        return None


def _asking_line() -> str:
    """Where in the user's code, or a library's, the question is asked."""
    stack = traceback.extract_stack()
    outside = [f for f in stack if "/torch/" not in f.filename and "/actckpt/" not in f.filename]
    return f"{outside[-1].filename}:{outside[-1].lineno}" if outside else "unknown line"
