"""N steps = k steps, end of the process, N - k steps in another one: every bit of the state."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.resumable import TOTAL_STEPS, Job, perform, write_jobs
from tests.suite import CASES

ROOT = Path(__file__).parent.parent
SAVED = 2


def in_another_process(directory: Path, jobs: list[Job]) -> int:
    """The exit status of a fresh process that performs jobs."""
    path = write_jobs(directory / "jobs.json", jobs)
    done = subprocess.run([sys.executable, "-m", "tests.resumable", str(path)], cwd=ROOT)
    return done.returncode


@pytest.fixture
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def differences(expected: Path, found: Path) -> list[str]:
    """What differs between two digests."""
    a, b = (json.loads(path.read_text(encoding="utf-8")) for path in (expected, found))
    return [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]


@pytest.mark.usefixtures("flat_profile", "one_thread")
@pytest.mark.parametrize("group", [sorted(CASES)[i::3] for i in range(3)], ids=range(3))
def test_resumed_in_a_new_process_every_item_is_the_same(group: list[str], tmp_path: Path) -> None:
    second = []
    for name in group:
        place = str(tmp_path / name)
        # bits do not depend on the plan, so there is none
        perform(Job(name, place + "-whole", policy="", digest=place + "-expected"))
        perform(Job(name, place, until=SAVED + 1, save_at=(SAVED,)))
        # twice: what the first did after resuming was not saved, and must leave no trace
        second.append(Job(name, place, seed=1, until=SAVED + 2, verbatim=True))
        second.append(Job(name, place, seed=2, verbatim=True, digest=place + "-found"))
    assert in_another_process(tmp_path, second) == 0
    for name in group:
        place = str(tmp_path / name)
        assert not differences(Path(place + "-expected"), Path(place + "-found")), name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_in_the_middle_of_an_epoch(workers: int, tmp_path: Path) -> None:
    def job(seed: int, place: str, **more: object) -> Job:
        tight = {"policy": "auto", "budget_gb": 0.03, "workers": workers}
        return Job("gpt2_dropout", str(tmp_path / place), seed, **{**tight, **more})  # type: ignore[arg-type]

    killed = [job(0, "run", save_at=(1, 2), kill_at=3)]
    assert in_another_process(tmp_path, killed) == -signal.SIGKILL
    found = str(tmp_path / "found")
    assert in_another_process(tmp_path, [job(5, "run", digest=found, verbatim=True)]) == 0
    expected = str(tmp_path / "expected")
    assert in_another_process(tmp_path, [job(0, "whole", digest=expected)]) == 0
    assert not differences(Path(expected), Path(found))


@pytest.mark.usefixtures("flat_profile", "one_thread")
def test_bits_do_not_depend_on_the_plan(tmp_path: Path) -> None:
    whole, _ = perform(Job("gpt2_dropout", str(tmp_path / "whole")))
    perform(Job("gpt2_dropout", str(tmp_path / "run"), until=SAVED, save_at=(SAVED,)))
    for policy in ("", "log"):
        run, resumed = perform(Job("gpt2_dropout", str(tmp_path / "run"), seed=3, policy=policy))
        assert resumed is not None
        assert resumed.bit_exact
        assert ("policy was 'full'" in resumed.plan) == (policy == "log")
        assert run.checkpointer.step_count == TOTAL_STEPS
        assert run.digest() == whole.digest()
