"""Real text that every machine has: the sources of the Python standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})


def standard_library_text() -> torch.Tensor:
    """The bytes of all modules of the standard library, its tests apart, in the order of paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not SKIPPED.intersection(path.relative_to(root).parts)
    )
    text = b"\n".join((root / path).read_bytes() for path in paths)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def draw_batch(
    text: torch.Tensor, batch_size: int, context: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, ids shifted by one), each (batch_size, context), at random places of ``text``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context - 1, (batch_size, 1), generator=generator)
    windows = text[starts + torch.arange(context + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
