"""What is built on Trainer: bitwise, within a budget, stopped and resumed; two lines of code.

These are the rows of `experiments.trainers` in this process, of four steps, without workers. Its
rows of Trainer, Lightning and accelerate are `test_killed_in_the_middle_of_an_epoch...` in
`test_trainer`, `test_lightning_budget` and `test_accelerate_budget`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("sentence_transformers")

from experiments.trainers import of_transformers
from experiments.trainers.outcome import is_same_run
from tests.trainer_runs import QUIET, Stopped, stop

pytestmark = QUIET
STEPS, STOPPED_AFTER = 3, 1


@pytest.mark.kind("what is built on Trainer", bits=True, peak="bounded", resumed="exact")
@pytest.mark.parametrize("name", [n for n in of_transformers.CASES if n != "Trainer, LoRA"])
def test_bitwise_within_the_budget_and_resumed(name: str, tmp_path: Path) -> None:
    build, share = of_transformers.CASES[name]
    settings: dict[str, Any] = {"max_steps": STEPS, "dataloader_num_workers": 0}
    whole = of_transformers.trained(build, tmp_path / "whole", None, None, **settings)
    added = whole.peak_bytes - whole.resident_bytes
    budget_gb = (whole.resident_bytes + share * added) / 1e9
    folder = tmp_path / "stopped"
    with pytest.raises(Stopped):
        of_transformers.trained(build, folder, budget_gb, STOPPED_AFTER, stop=stop, **settings)
    rest = of_transformers.trained(build, folder, budget_gb, None, **settings)
    assert (rest.resumed, rest.inexact) == (STOPPED_AFTER, ())
    assert len(rest.losses) == STEPS - STOPPED_AFTER
    assert is_same_run(whole, rest.losses, rest.weights)
    assert 0 < rest.peak_bytes <= budget_gb * 1e9 < whole.peak_bytes


def test_a_second_epoch_of_samplers_in_samplers_is_resumed_with_workers(tmp_path: Path) -> None:
    """sentence-transformers' batch sampler and accelerate's below it are both told the epoch."""
    # two steps an epoch: stopped in the middle of the second one
    settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 9}
    whole = of_transformers.trained(
        of_transformers.bi_encoder, tmp_path / "whole", None, None, **settings
    )
    folder, ample_gb = tmp_path / "stopped", 1.0
    with pytest.raises(Stopped):
        of_transformers.trained(
            of_transformers.bi_encoder, folder, ample_gb, 3, stop=stop, **settings
        )
    rest = of_transformers.trained(of_transformers.bi_encoder, folder, ample_gb, None, **settings)
    assert (rest.resumed, rest.inexact) == (3, ())
    assert is_same_run(whole, rest.losses, rest.weights)
