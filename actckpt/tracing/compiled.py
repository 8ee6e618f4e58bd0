"""Compiled functions of the user's own, met in a step that runs under a dispatch mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
