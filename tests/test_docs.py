"""The pages of docs/: the site builds without a warning, and what they show is there and runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import actckpt
from actckpt.cli import main
from experiments.measured.page import PAGE, page, readme
from tests.pages import DOCS, PAGES, README, ROOT, blocks, commands, mentioned, name

# a model and a batch of the user's own, for the commands that name one
BUILD = """
import torch
def build():
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
    return model, torch.randn(2, 8)
"""
# what docs say of them is tried in tests of their own
ELSEWHERE = {"pip", "make"}


# TRL and what it imports warn of each other
QUIET = {"trl.md": [pytest.mark.filterwarnings("ignore")]}
WITH_BLOCKS = [
    pytest.param(path, id=name(path), marks=QUIET.get(path.name, ()))
    for path in PAGES
    if path != README and blocks(path, "python")
]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """A link that leads nowhere, or a docstring that does not render, is a warning."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    reference = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for shown in ("optimize", "Checkpointer.steps", "Checkpointer.resume"):  # one is inherited
        assert f'id="actckpt.{shown}"' in reference


def test_every_public_name_is_in_the_reference() -> None:
    named = re.findall(r"^::: actckpt\.(\w+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(actckpt.__all__)


def test_nothing_is_fetched_by_a_page() -> None:
    """Fonts, scripts and pictures come with the site."""
    sources = [*PAGES, *DOCS.rglob("*.svg"), *DOCS.rglob("*.css"), ROOT / "mkdocs.yml"]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        fetched = re.findall(r"(?:src=|url\(|!\[[^\]]*\]\()[\"']?https?://[^\s\"')]+", text)
        assert not fetched, f"{path.name}: {fetched}"


def test_measured_is_what_the_results_say() -> None:
    """`python -m experiments.measured` would change nothing."""
    assert PAGE.read_text("utf-8") == page()
    text = README.read_text("utf-8")
    assert text == readme(text)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.parametrize("path", WITH_BLOCKS)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, where nothing else lies."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(path, "python"):
        exec(compile(block, name(path), "exec"), namespace)


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `actckpt` command of every page, where there is what they name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "training.py").write_text(BUILD)
    _run_of_400_steps(tmp_path / "runs" / "a")
    tried = set()
    for path in PAGES:
        for words in commands(path):
            if words[0] in ELSEWHERE or tuple(words) in tried:
                continue
            assert words[0] == "actckpt", f"{name(path)}: {words}"
            # 1: two checkpoints differ
            assert main(words[1:]) in ((0, 1) if "diff" in words else (0,)), words
            tried.add(tuple(words))
    assert len(tried) >= 10


def _run_of_400_steps(directory: Path) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    loader: Any = torch.utils.data.DataLoader(cast(Any, torch.randn(400, 4)), batch_size=1)
    with actckpt.Checkpointer(
        directory, model=model, optimizer=optimizer, loader=loader, every=200
    ) as run:
        run.resume()
        for _, batch in run.steps():
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_what_a_page_names_is_there(path: Path) -> None:
    """Files, targets of make, and modules that are run."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert mentioned(path, r"`make ([a-z]+)`") <= targets
    for module in mentioned(path, r"python -m ((?:experiments|tests)[.\w]*)"):
        assert importlib.util.find_spec(module) is not None, module
    for file in mentioned(path, r"`((?:\w[\w.]*/)+[\w.-]+\.(?:py|md|jsonl|toml|yml))`"):
        assert any((base / file).exists() for base in (ROOT, ROOT / "actckpt")), file


@pytest.mark.parametrize("path", [README, ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_of_a_page_that_is_not_on_the_site(path: Path) -> None:
    """Those of the other pages are the site's to check."""
    for target in mentioned(path, r"\]\(((?!http)[^)#\s]+)(?:#[^)]*)?\)"):
        assert (path.parent / target).exists(), target
