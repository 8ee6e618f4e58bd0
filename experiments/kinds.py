"""The kinds of training steps and loops that people write, and what is promised of each.

Every row is a test that carries ``pytest.mark.kind(name, bits=, peak=, resumed=)``: what it
asserts. With ``--before`` the same tests also run on another tree of the library, where they should
fail. Where this tree's tests import what is not there, those of a third tree can be named.

    git worktree add ../before 573e56b
    git worktree add ../then COMMIT
    python -m experiments.kinds --before ../before --tests-before ../then [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments.results import FOLDER, circumstances, markdown_table, write_markdown

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {"bits": "gradients", "peak": "peak", "resumed": "resumed"}

# that the tests meet
LIBRARIES = (
    "torch", "transformers", "accelerate", "lightning", "trl", "sentence-transformers", "diffusers",
    "bitsandbytes", "torchao", "torchdata", "datasets", "peft", "pytorch_optimizer", "schedulefree",
)  # fmt: skip

Rows = dict[str, dict[str, Any]]


class Collector:
    """A plugin of pytest's: the marked tests, and what became of each."""

    def __init__(self) -> None:
        self.rows: Rows = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            mark = item.get_closest_marker("kind")
            if mark is not None:
                self.rows[item.nodeid] = {"kind": mark.args[0], **mark.kwargs}

    def pytest_runtest_logreport(self, report: Any) -> None:
        row = self.rows.get(report.nodeid)
        if row is None or row.get("outcome") == "failed":
            return
        if report.when == "call" or report.outcome != "passed":
            row["outcome"] = report.outcome


def collect(out: Path) -> None:
    """Runs the marked tests of the folder that this process is in."""
    import pytest

    collector = Collector()
    arguments = ["-q", "-m", "kind", "-p", "no:cacheprovider", "--tb=line", "-r", "N"]
    arguments.append("--continue-on-collection-errors")
    pytest.main(arguments, plugins=[collector])
    out.write_text(json.dumps(collector.rows), encoding="utf-8")


def rows_of(library: Path, tests: Path = ROOT) -> Rows:
    """What became of a tree's marked tests on the library of another."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "actckpt").symlink_to(library / "actckpt")
        (place / "experiments").symlink_to(ROOT / "experiments")
        for name in ("tests", "pyproject.toml", "Makefile", "README.md"):
            (place / name).symlink_to(tests / name)
        out = place / "rows.json"
        subprocess.run(
            [sys.executable, "-m", "experiments.kinds", "--collect", str(out)],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(place)},
            check=True,
            stdout=sys.stderr,
        )
        found: Rows = json.loads(out.read_text(encoding="utf-8"))
    return found


def table(here: Rows, before: Rows | None) -> str:
    """A line for every kind; several tests of one are counted."""
    kinds: dict[str, list[str]] = {}
    for test, row in here.items():
        kinds.setdefault(row["kind"], []).append(test)
    lines = []
    for kind, tests in kinds.items():
        promised = [_promised(name, [here[t] for t in tests]) for name in COLUMNS]
        line = [kind, *promised, _passed(here, tests)]
        if before is not None:
            line.append(_passed(before, tests))
        lines.append([*line, tests[0].partition("[")[0]])
    columns = ["kind", *COLUMNS.values(), "passed"]
    if before is not None:
        columns.append("passed before")
    return markdown_table([*columns, "test"], lines)


def _promised(name: str, rows: Sequence[dict[str, Any]]) -> str:
    values = {str(row[name]) for row in rows if name in row}
    return " or ".join(sorted(values)).replace("True", "bitwise equal") or "–"


def _passed(rows: Rows, tests: Sequence[str]) -> str:
    run = [t for t in tests if t in rows]
    passed = sum(rows[t].get("outcome") == "passed" for t in run)
    return f"{passed} of {len(run)}" if run else "cannot be imported"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.kinds", description=__doc__)
    parser.add_argument("--before", type=Path, help="another tree, for a column of its own")
    parser.add_argument(
        "--tests-before", type=Path, default=ROOT, help="a tree whose tests run on the other one"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of kinds.md")
    parser.add_argument("--collect", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.collect is not None:
        collect(options.collect)
        return 0
    if options.before is not None and not (options.before / "actckpt" / "api.py").exists():
        parser.error(f"--before must be a tree of actckpt; found {options.before}")
    with ThreadPoolExecutor() as pool:
        mine = pool.submit(rows_of, ROOT)
        before = None
        if options.before is not None:
            before = rows_of(options.before.resolve(), options.tests_before.resolve())
        here = mine.result()
    about = circumstances(
        {name: version(name) for name in LIBRARIES},
        peak="within the budget, or said beforehand",
        resumed="to the last bit, or said that it is not",
        tests=f"{len(here)}, of which {sum(r.get('outcome') == 'passed' for r in here.values())} "
        "passed",
    )
    parts = ["# Kinds of steps and loops", table(here, before)]
    write_markdown("kinds", about, *parts, folder=options.out)
    print("\n\n".join(parts))
    return int(any(r.get("outcome") == "failed" for r in here.values()))


if __name__ == "__main__":
    sys.exit(main())
