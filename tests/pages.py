"""The pages of README and docs, and what of them can be run: Python blocks, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = (README, *sorted(DOCS.rglob("*.md")))
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    """Of a page, from the root."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page that are of a language; "" is none."""
    return [text for found, text in _BLOCK.findall(page.read_text("utf-8")) if found == language]


def commands(page: Path) -> list[list[str]]:
    """The commands in the blocks of a page that are of no language, as words."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def mentioned(page: Path, pattern: str) -> set[str]:
    """What a page says that matches a pattern, anywhere in it."""
    return set(re.findall(pattern, page.read_text("utf-8")))
