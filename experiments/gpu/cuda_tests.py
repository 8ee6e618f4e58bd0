"""The tests that need a CUDA device, run beside everything else that is to be known of one."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

_VERDICT = re.compile(r"\] (PASSED|FAILED|ERROR|SKIPPED) (tests/.*\S)")  # of several processes
_VERDICT_AFTER = re.compile(r"^(tests/.*\S)\s+(PASSED|FAILED|ERROR|SKIPPED)\b")


@dataclass
class CudaTests:
    """What the tests came to.

    Attributes:
        counts: verdict -> how many.
        failed: the tests that failed.
        ended: whether they ran to their end.
    """

    counts: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    ended: bool = False
    missing: str = ""

    def __str__(self) -> str:
        if self.missing:
            return f"not run: {self.missing} is not installed"
        found = ", ".join(f"{n} {verdict.lower()}" for verdict, n in sorted(self.counts.items()))
        return (found or "none ran") + ("" if self.ended else "; stopped when their time was over")

    def note(self, line: str) -> None:
        """A line of pytest's output, with or without several processes."""
        before, after = _VERDICT.search(line), _VERDICT_AFTER.search(line)
        if after is not None:
            test, verdict = after.groups()
        elif before is not None:
            verdict, test = before.groups()
        else:
            return
        self.counts[verdict] = self.counts.get(verdict, 0) + 1
        if verdict in ("FAILED", "ERROR"):
            self.failed.append(test)


def run_cuda_tests(log: Path, seconds: float) -> CudaTests:
    """Runs every test marked ``gpu`` until the time is over.

    Args:
        log: where pytest's whole output goes as it comes.
    """
    tests = CudaTests()
    if find_spec("pytest") is None:
        tests.missing = "pytest"
        return tests
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "--tb=short", "-p",
               "no:cacheprovider", "-r", "N", *(["-n", "4"] if find_spec("xdist") else []),
               *_files()]  # fmt: skip
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        begin = time.monotonic()
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            tests.note(line)
        status = process.wait()
        timer.cancel()
    tests.ended = status >= 0 and time.monotonic() - begin < seconds
    if tests.ended and not tests.counts:
        tests.failed.append(f"pytest ended with status {status} and ran nothing: see {log.name}")
    return tests


def _files() -> list[str]:
    """The files that have such tests: no other one need be importable here."""
    folder = Path(__file__).resolve().parents[2] / "tests"
    marked = (p for p in sorted(folder.glob("test_*.py")) if "mark.gpu" in p.read_text("utf-8"))
    return [f"tests/{p.name}" for p in marked]
