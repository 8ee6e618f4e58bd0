"""README stays short, and what it says its example prints is what it prints."""

from __future__ import annotations

import contextlib
import io
import re

import torch

import actckpt
from tests.pages import DOCS, README, blocks

LONGEST_LINES = 120


def test_it_is_read_in_minutes() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= LONGEST_LINES


def test_the_example_prints_what_is_shown() -> None:
    """The peaks: the untouched one to a hundredth, since scratch differs between processors."""
    printed = io.StringIO()
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    example, resumed = blocks(README, "python")
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), namespace)
        exec(compile(resumed, "README.md", "exec"), namespace)
    shown = blocks(README, "text")[0]
    before, after = map(int, re.findall(r"\d+", shown))
    found_before, found_after = map(int, re.findall(r"\d+", printed.getvalue()))
    assert abs(found_before - before) <= 0.01 * before
    assert found_after <= after


def test_every_policy_is_in_the_table() -> None:
    text = (DOCS / "budget.md").read_text("utf-8")
    for name in actckpt.POLICIES:
        assert f"| `{name}` |" in text
