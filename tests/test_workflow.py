"""The hosted workflow and the hooks before commits: what they run is there, on what is claimed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_the_workflow_tests_every_python_that_is_claimed() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text("utf-8"))
    job = workflow["jobs"]["test"]
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    claimed = [c.rpartition(" ")[2] for c in setup["project"]["classifiers"] if ":: 3." in c]
    assert job["strategy"]["matrix"]["python-version"] == claimed
    (command,) = (step["run"] for step in job["steps"] if "run" in step)
    assert command.split()[:2] == ["make", "test"]


def test_hooks_run_what_the_environment_has() -> None:
    """Files that are named exist, and so do the modules."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    for hook in (hook for repo in hooks for hook in repo["hooks"]):
        program, *words = hook["entry"].split()
        assert program.startswith(".venv/bin/")
        if words[0] == "-m":
            assert (ROOT / words[1].replace(".", "/") / "__main__.py").exists()
        assert re.compile(hook.get("files", ""))
