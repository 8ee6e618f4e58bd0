"""What the GPU campaign says of what it finds; the campaign itself is rehearsed with `--quick`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu import processes
from experiments.gpu.cases import read_rows
from experiments.gpu.cuda_tests import CudaTests
from experiments.gpu.table import failures, set_aside
from experiments.gpu_campaign import main


def test_verdicts_of_one_and_of_several_processes() -> None:
    tests = CudaTests()
    for line in (
        "tests/test_gpu.py::test_a[resnet-one burst] PASSED            [  2%]",
        "tests/test_gpu.py::test_a[unet-one] FAILED                    [  5%]",
        "[gw1] [ 25%] PASSED tests/test_gpu.py::test_a[vit-one] ",
        "[gw0] [ 50%] FAILED tests/test_gpu.py::test_a[gpt2-one] ",
        "FAILED is a word",
    ):
        tests.note(line)
    assert tests.counts == {"PASSED": 2, "FAILED": 2}
    assert tests.failed == [
        "tests/test_gpu.py::test_a[unet-one]",
        "tests/test_gpu.py::test_a[gpt2-one]",
    ]
    assert "stopped" in str(tests)


def test_failures_are_what_is_ours() -> None:
    untouched: dict[str, Any] = {"model": "m", "case": "untouched", "equal": True}
    over = {"within": False, "allocated_bytes": 110, "budget_bytes": 100, "equal": False}
    rows: list[dict[str, Any]] = [
        untouched,
        {"model": "m", "case": "torch", "equal": False},
        {"model": "m", "case": "share 0.5", **over},
        {"model": "n", "case": "untouched", "equal": False},
        {"model": "n", "case": "share 0.5", "equal": False},
        {"model": "n", "case": "deterministic", "equal": {"again": True, "share 0.5": False}},
        {"model": "n", "case": "times", "failed": "RuntimeError: x"},
    ]
    assert failures(rows) == [
        "m, share 0.5: 10.0 % over its budget",
        "m, share 0.5: other gradients or buffers than untouched",
        "n, share 0.5, deterministic: other gradients or buffers",
        "n, times: RuntimeError: x",
    ]


def test_results_of_another_device_are_kept_beside(tmp_path: Path) -> None:
    about = {"about": {"hardware": "NVIDIA H100 80GB HBM3; a processor"}}
    (tmp_path / "gpu.jsonl").write_text(json.dumps(about) + "\n")
    (tmp_path / "gpu.md").write_text("old")
    set_aside(tmp_path, "NVIDIA H100 80GB HBM3")
    assert (tmp_path / "gpu.md").exists()
    set_aside(tmp_path, "NVIDIA H200")
    assert (tmp_path / "gpu_nvidia_h100_80gb_hbm3.md").read_text() == "old"
    assert not (tmp_path / "gpu.jsonl").exists()


def _hangs(name: str, path: Path, rounds: int, until: float) -> None:
    time.sleep(60)


def test_a_model_that_hangs_is_killed_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "run", _hangs)
    path, said = tmp_path / "gpu_rows.jsonl", list[str]()
    begin = time.time()
    processes.run_models(["vit"], path, 2, until=begin, end=begin + 0.5, done=said.append)
    assert said == ["vit"]
    (row,) = read_rows(path)
    assert row["failed"] == "killed: its time was over"


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.gpu_campaign.find_spec", lambda name: name != "xxhash" or None)
    monkeypatch.setattr(sys, "argv", ["gpu_campaign"])
    assert main() == 2
    assert "pip install xxhash" in capsys.readouterr().out


def test_runs_from_the_checkout_without_a_device_only_when_asked() -> None:
    command = [sys.executable, "-m", "experiments.gpu_campaign"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "--quick" in done.stdout
