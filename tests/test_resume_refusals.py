"""A checkpoint of something else is refused or reported, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import actckpt
from tests.small_run import advance, objects, state
from tests.test_checkpoint_encoding import same


def other_model(made: dict[str, Any]) -> dict[str, Any]:
    return objects(width=4)


def other_optimizer(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "optimizer": torch.optim.SGD(made["model"].parameters(), lr=1)}


def other_order(made: dict[str, Any]) -> dict[str, Any]:
    parameters = [*made["model"].parameters()][::-1]
    return {**made, "optimizer": torch.optim.AdamW(parameters)}


def other_groups(made: dict[str, Any]) -> dict[str, Any]:
    groups = [{"params": [p]} for p in made["model"].parameters()]
    return {**made, "optimizer": torch.optim.AdamW(groups)}


def more_objects(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "scheduler": torch.optim.lr_scheduler.StepLR(made["optimizer"], 1)}


def more_data(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "loader": [torch.ones(1)] * 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_model, r"first\.weight is float32 \[4, 2\], saved was float32 \[3, 2\].*and 3 more"),
        (other_optimizer, "the optimizer of a AdamW, this is a SGD"),
        (other_order, r"parameter 0 .* is norm\.bias, saved was first\.weight"),
        (other_groups, r"groups of \[1, 1, 1, 1\] parameters, saved were groups of \[4\]"),
        (more_objects, "saved without scheduler"),
        (more_data, "loader of 2 batches an epoch, this one has 3"),
    ],
)
def test_checkpoints_of_other_objects_are_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, loader=[torch.ones(1)] * 2) as run:
        advance(run, made, 1)
        run.save()
    given = {"loader": [torch.ones(1)] * 2, **change(objects(seed=1))}
    live = {k: v for k, v in given.items() if k != "loader"}
    before = state(live)
    with actckpt.Checkpointer(tmp_path, **given) as run:
        with pytest.raises(actckpt.CheckpointMismatchError, match=message):
            run.resume()
        assert run.step_count == 0
    assert same(state(live), before)


def test_other_versions_and_configs_are_reported(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, config={"lr": 1, "seed": 2}) as run:
        run.save()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with actckpt.Checkpointer(tmp_path, **made, config={"lr": 3, "seed": 2}) as run:
            resumed = run.resume()
    finally:
        torch.set_num_threads(threads)
    assert resumed is not None
    assert not resumed.bit_exact
    assert resumed.inexact == (f"threads was {threads}, is {threads + 1}",)
    assert resumed.notes == ("config lr was 1, is 3",)
