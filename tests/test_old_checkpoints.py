"""What 573e56b wrote is resumed by this tree: state, position, plan, and the very same batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actckpt.resuming import plans
from actckpt.resuming.resumed import version_differences
from actckpt.session.session import session_of
from actckpt.versions import versions
from tests.written_by_573e56b.make import KINDS, SAVED_AFTER, Run

WRITTEN = Path(__file__).parent / "written_by_573e56b"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", KINDS)
def test_resumes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS[name]
    shutil.copytree(WRITTEN / name, tmp_path / name)
    record = json.loads((WRITTEN / f"{name}.json").read_text())
    run = Run(kind, tmp_path / name, seed=1, budget_gb=record["budget_gb"])
    (checkpoint,) = run.checkpointer.list()
    made_on = checkpoint.manifest.versions
    # a plan is taken where it was made: let this be that machine
    monkeypatch.setattr(plans, "versions", lambda: {**versions(), **made_on})

    resumed = run.checkpointer.resume()

    assert resumed is not None
    trained_on = SAVED_AFTER * kind.accumulate + kind.accumulate // 2
    assert (resumed.step, resumed.epoch, resumed.batch) == (SAVED_AFTER, 0, trained_on)
    assert not resumed.skipped
    assert resumed.plan == "the saved plan is used for the step that it was made for"
    for item, saved in (
        (run.model.state_dict(), "model"),
        (run.ema.state_dict(), "ema"),
        (
            {
                f"state/{number}/{key}": value
                for number, state in run.optimizer.state_dict()["state"].items()
                for key, value in state.items()
            },
            "optimizer",
        ),
    ):
        found = load_file(checkpoint.path / f"{saved}.safetensors")
        assert len(found) >= len(item)
        for key, value in item.items():
            assert torch.equal(value, found[key]), (saved, key)
    assert len(run.tally.losses) == trained_on

    def measured(*_: Any, **__: Any) -> Any:
        raise AssertionError("planned anew")

    monkeypatch.setattr("actckpt.planning.making.build_profile", measured)
    batches = run.batches(begun=kind.accumulate // 2)
    beyond = [next(batches) for _ in record["beyond"]]
    assert [indices for indices, _ in beyond] == [indices for indices, _ in record["beyond"]]
    session = session_of(run.model)
    assert session is not None
    assert session.current is not None
    assert session.current.planned.plan in [r.plan for r in session.recalled]
    if not version_differences(made_on, versions()):  # else other kernels may round otherwise
        assert [loss for _, loss in beyond] == [loss for _, loss in record["beyond"]]
    run.checkpointer.close()
