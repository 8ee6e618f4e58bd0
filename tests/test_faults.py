"""Whatever happens to a process, its files or its device: no checkpoint is lost, none is made up.

A part of what ``make faults`` does in full.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actckpt.checkpoint.files import Files
from tests.faults.disk import Disk
from tests.faults.erring import inject
from tests.faults.kinds import Fails, errors
from tests.faults.mutants import MUTANTS
from tests.faults.recording import Recording, apply
from tests.faults.scene import Scene, scenes
from tests.faults.survivors import FIXED
from tests.faults.tally import Tally
from tests.system_calls import NAMES, Watched

ROOT = Path(__file__).parent.parent
SCENES = (
    "next",
    "first",
    "thread",
    "due",
    "two at a time",
    "asked for",
    "pins",
    "frozen",
)
SCANS = ("killed", "errors", "power lost", "killed, then power lost")


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process of its own, which may fork, has injected and found."""
    path = tmp_path_factory.mktemp("faults") / "books.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert path.exists(), done.stdout + done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    found["status"] = done.returncode
    return found


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("scan", SCANS)
def test_nothing_is_lost_and_every_fault_fires(scene: str, scan: str, books: Any) -> None:
    (tally,) = (t for t in books["books"] if t["name"] == f"{scene}: {scan}")
    assert tally["violations"] == []
    assert tally["missed"] == []
    assert tally["injected"] == tally["fired"] > 5


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_broken_on_purpose_is_caught(mutant: str, books: Any) -> None:
    assert MUTANTS[mutant].harm in books["mutants"][mutant]


def test_the_program_says_so(books: Any) -> None:
    assert len(books["books"]) == len(SCENES) * len(SCANS)
    assert books["status"] == 0


# the harness itself


def test_a_fault_that_does_not_fire_is_seen() -> None:
    scene, tally = Scene("first", None), Tally("x")
    inject(scene, [Fails(10_000, 5)], tally)
    assert (tally.injected, tally.fired, tally.violations) == (1, 0, [])


def test_a_kill_that_does_not_happen_is_seen(books: Any) -> None:
    assert (books["beyond"]["injected"], books["beyond"]["fired"]) == (1, 0)


def test_there_are_errors_of_every_kind_of_call() -> None:
    with scenes() as (_, first, *_):
        names, _ = first.calls()
    assert {*names, "unlink", "rmdir", "rename"} == set(NAMES)
    failing = [fault for fault in errors(names) if isinstance(fault, Fails)]
    assert {f.code for f in failing} == {5, 28, 30, 24, 4}
    assert {f.at for f in failing if f.late} == {f.at for f in failing if not f.late}


def test_the_simulated_disk_keeps_what_was_synced_and_no_more(tmp_path: Path) -> None:
    disk, recording = Disk(tmp_path), Recording()
    files = Files(Watched(recording))
    root = str(tmp_path)
    synced, names, content = ({} for _ in range(3))

    def look() -> list[dict[str, bytes | None]]:
        apply(disk, recording.events)
        recording.events.clear()
        return [{k: v for k, v in s.left(disk.root).items() if k != "."} for s in FIXED]

    files.make_directory(f"{root}/a")
    with files.writing(f"{root}/a/x") as sink:
        sink.write(b"12")
        synced, names, content = look()
        assert (synced, names, content) == ({}, {"./a": None, "./a/x": b""}, {})
    assert look()[:2] == [{}, {"./a": None, "./a/x": b"12"}]
    files.sync_directory(root)
    assert look()[0] == {"./a": None}
    files.sync_directory(f"{root}/a")
    assert look()[0] == {"./a": None, "./a/x": b"12"}
    files.rename(f"{root}/a", f"{root}/b")
    assert look()[:2] == [{"./a": None, "./a/x": b"12"}, {"./b": None, "./b/x": b"12"}]
    files.remove_tree(f"{root}/b")
    assert look()[:2] == [{"./a": None, "./a/x": b"12"}, {}]
    files.sync_directory(root)
    assert look() == [{}, {}, {}]
