"""How trainings under trainers are stopped, killed and compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exact import same_bits

# libraries about each other, and about small trainings
QUIET = [
    pytest.mark.usefixtures("flat_profile"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Stopped(Exception):
    """In place of a kill, where the process is still needed."""


def stop(*_: Any) -> None:
    """Ends a training."""
    raise Stopped


def bits(model: Any) -> dict[str, torch.Tensor]:
    """What a model holds now."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def is_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two models hold the same bits."""
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def killed(module: str, folder: Path) -> None:
    """Trains in a process of its own, ``python -m MODULE FOLDER THREADS``, that kills itself."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder), str(torch.get_num_threads())],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr[-2000:].decode()
