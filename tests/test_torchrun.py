"""The trainers' MemoryBudgets in several processes: the same bits, and resumed to the last one."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from tests.ranked import launch

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
pytest.importorskip("transformers")

from actckpt.integrations.replicas import BUCKETS, bucket_bytes, budget_left
from tests.trained_by_ranks import STOPPED_AT


def test_two_ranks_stopped_in_the_middle_of_an_epoch_go_on_to_the_last_bit(tmp_path: Path) -> None:
    """`python -m tests.faults.torchrun` kills them."""
    ranks = launch(tmp_path, "tests.trained_by_ranks", "all", 2)
    for kind in ranks[0]:
        for rank in ranks:
            whole, resumed = rank[kind]["whole"], rank[kind]["resumed"]
            assert "stopped" not in rank[kind]
            step, inexact = resumed["resumed"]
            assert not inexact, (kind, inexact)
            assert 0 < step <= STOPPED_AT
            count = len(resumed["losses"])
            assert count < len(whole["losses"])
            assert resumed["losses"] == whole["losses"][-count:], kind
            assert resumed["logged"] == whole["logged"][-len(resumed["logged"]) :], kind
            assert resumed["state"] == whole["state"], kind
            assert resumed["drawn"] == whole["drawn"], kind
            assert resumed["difference"] == "None"
            assert resumed["saved"][1] == "committed"
        first, second = (rank[kind]["whole"] for rank in ranks)
        # each its own data, and one model
        assert first["losses"] != second["losses"]
        assert first["state"] == second["state"]
        assert ranks[0][kind]["resumed"]["resumed"] == ranks[1][kind]["resumed"]["resumed"]


def test_a_model_that_is_cut_over_processes_is_refused() -> None:
    from actckpt.integrations.transformers import _refuse

    args: Any = types.SimpleNamespace(world_size=2, n_gpu=1)
    with pytest.raises(actckpt.PlanError, match="this training has 2 processes around a Linear"):
        _refuse(args, nn.Linear(1, 1))


def test_what_exchanges_gradients_is_taken_off_the_budget(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Linear(100, 10)
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert bucket_bytes(model) == {}
        assert bucket_bytes(wrapped) == {BUCKETS: 4040}
        assert budget_left("1MB", model, bucket_bytes(wrapped)) == "0.99596MB"
        with pytest.raises(actckpt.BudgetError, match=BUCKETS):
            budget_left("4kB", model, bucket_bytes(wrapped))
        with pytest.raises(actckpt.PlanError, match="on the inner module first"):
            actckpt.optimize(wrapped, "8GB")
    finally:
        torch.distributed.destroy_process_group()
