"""More than one process: refused in each of them, in a sentence, and nobody waits for another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
pytest.importorskip("transformers")

ONE = "MemoryBudget plans for one process with one device; "
SAID = {
    "accelerate": f"{ONE}this accelerator has 2 processes. Start one, as in accelerate launch ",
    "transformers": f"{ONE}this training has 2 processes. Start one, without torchrun ",
    "lightning": f"{ONE}this trainer has 2 processes. Pass Trainer(devices=1, num_nodes=1); or ",
    "by hand": "DistributedDataParallel wraps the model that is to be planned: call ",
}


def test_two_ranks_are_each_told_and_end(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.ranks", str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:].decode()
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8"))
        assert found.keys() == SAID.keys()
        for name, (kind, text) in found.items():
            assert kind == "PlanError", (name, text)
            assert text.startswith(SAID[name])
            assert len(text.splitlines()) == 1
    # nothing was begun
    assert not [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "out"]
