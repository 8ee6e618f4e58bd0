"""The README's Python blocks run, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import actckpt

ROOT = Path(__file__).parents[1]


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert isinstance(namespace["report"], actckpt.Report)


def test_every_policy_is_in_the_table() -> None:
    text = (ROOT / "README.md").read_text()
    for name in actckpt.POLICIES:
        assert f"| `{name}` |" in text


def test_every_file_that_is_shown_exists() -> None:
    text = (ROOT / "README.md").read_text()
    shown = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
    for path in shown:
        assert (ROOT / path).exists(), path
