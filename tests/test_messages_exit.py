"""An interpreter that exits while objects of ours are open says nothing of it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from actckpt.checkpoint.discovery import discover
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.verification import verify_files

ROOT = Path(__file__).parent.parent

SCRIPT = """
    import sys
    from pathlib import Path
    import torch
    import actckpt

    kept = []

    def train(name, suspended):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        actckpt.optimize(model, None, policy="full", loss_fn=lambda out: out.square().mean())
        data = torch.utils.data.DataLoader(torch.ones(8, 64), batch_size=2)
        run = actckpt.Checkpointer(
            Path(sys.argv[1]) / name, model=model, optimizer=optimizer, loader=data, every=1
        )
        steps = suspended(run)
        for _ in range(2):
            step, batch = next(steps)
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            run.step({"loss": loss})
            kept.append(model(batch))  # whose backward never comes
        kept.append(steps)

    def left_open(run):
        return run.steps(epochs=2)

    def inside_with(run):
        with run:
            yield from run.steps(epochs=2)

    train("left-open", left_open)
    train("inside-with", inside_with)
"""


def test_an_exit_with_everything_open(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if not line.startswith("actckpt: plan")]
    assert not said
    assert done.returncode == 0
    for name in ("left-open", "inside-with"):
        found = discover(Files(), str(tmp_path / name))
        assert [c.step for c in found.checkpoints] == [2, 1]
        assert not found.skipped
        for checkpoint in found.checkpoints:
            verify_files(Files(), str(checkpoint.path))
