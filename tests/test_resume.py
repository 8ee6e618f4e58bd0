"""N steps = k steps, SIGKILL, N - k steps in another process: every bit of the state.

`make test` resumes a small model, `make resume` every one of the suite.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.resumable import TOTAL_STEPS, Job, perform, write_jobs
from tests.suite import CASES

ROOT = Path(__file__).parent.parent
SAVED = 2
WHOLE = bool(os.environ.get("ACTCKPT_RESUME"))
# random operations; planned in a second
FEW = [["lstm"]]
GROUPS = [[name] for name in sorted(CASES)] if WHOLE else FEW
TIGHT = {"policy": "auto", "scope": "activations", "share": 0.5}


def in_other_processes(directory: Path, jobs: list[Job]) -> None:
    """Performs jobs, each in a fresh process."""
    path = write_jobs(directory / "jobs.json", jobs)
    subprocess.run([sys.executable, "-m", "tests.resumable", str(path)], cwd=ROOT, check=True)


def differences(expected: Path, found: Path) -> list[str]:
    """What differs between two digests."""
    a, b = (json.loads(path.read_text(encoding="utf-8")) for path in (expected, found))
    return [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]


@pytest.mark.parametrize("group", GROUPS, ids="-".join)
def test_killed_and_resumed_every_item_is_the_same(group: list[str], tmp_path: Path) -> None:
    def job(name: str, seed: int, **more: object) -> Job:
        return Job(name, str(tmp_path / name), seed, workers=2, **{**TIGHT, **more})  # type: ignore[arg-type]

    jobs = []
    for name in group:
        digests = {end: str(tmp_path / f"{name}-{end}") for end in ("whole", "once", "twice")}
        # in the middle of an epoch, with what the third step did lost
        jobs.append(job(name, 0, save_at=(SAVED,), kill_at=SAVED + 1))
        # twice: what the first did after resuming was not saved, and must leave no trace
        jobs.append(job(name, 1, verbatim=True, digest=digests["once"]))
        jobs.append(job(name, 2, verbatim=True, digest=digests["twice"]))
        # bits do not depend on the plan, so there is none
        plain = str(tmp_path / name) + "-plain"
        jobs.append(Job(name, plain, workers=2, digest=digests["whole"], policy=""))
    in_other_processes(tmp_path, jobs)
    for name in group:
        whole = tmp_path / f"{name}-whole"
        assert not differences(whole, tmp_path / f"{name}-once"), name
        assert not differences(whole, tmp_path / f"{name}-twice"), name


@pytest.fixture
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("flat_profile", "one_thread")
def test_bits_do_not_depend_on_the_plan(tmp_path: Path) -> None:
    name = "siamese"
    whole, _ = perform(Job(name, str(tmp_path / "whole")))
    perform(Job(name, str(tmp_path / "run"), until=SAVED, save_at=(SAVED,)))
    for policy in ("", "log"):
        run, resumed = perform(Job(name, str(tmp_path / "run"), seed=3, policy=policy))
        assert resumed is not None
        assert ("policy was 'full'" in resumed.plan) == (policy == "log")
        assert run.checkpointer.step_count == TOTAL_STEPS
        assert run.digest() == whole.digest()
