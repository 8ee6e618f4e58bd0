"""Exports that libraries write show nothing half-done, wherever the process is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.export_kills import FORMATS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def told() -> Any:
    """What a process of its own, which may fork, has killed and found."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.export_kills"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("format", FORMATS)
def test_killed_in_a_librarys_own_code(format: str, told: Any) -> None:
    found = told[format]
    assert found["wrong"] == []
    assert found["kills"] > found["sizes"] + 15
    # every file is one that a write was killed in
    assert found["sizes"] >= 4
    assert 0 < found["there"] < 5
    # calls of libraries, too
    assert set(found["by"]) > {"actckpt"}
