"""TRL's SFT trainer puts a forward of its own on the model, which never calls what stood there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import actckpt

with warnings.catch_warnings():  # of the libraries about each other
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
from actckpt.integrations.transformers import MemoryBudget
from tests.trained import Stops, history
from tests.trainer_models import make_llama, make_tokenizer, text
from tests.trainer_runs import QUIET, Stopped, bits, is_same, stop

pytestmark = QUIET


def trained(model: Any, folder: Path) -> list[torch.Tensor]:
    texts = [text(i, 20) for i in range(6)]
    settings = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        max_length=32,
        activation_checkpointing=False,
        seed=1,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    return [p.detach().clone() for p in model.parameters()]


def rewarded(folder: Path, *callbacks: Any) -> Any:
    """GRPO that generates once for two optimizer steps."""

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(completion.split()))) for completion in completions]

    settings = trl.GRPOConfig(
        str(folder / "out"),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_generations=2,
        steps_per_generation=4,
        max_completion_length=6,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        activation_checkpointing=False,
        seed=1,
    )
    return trl.GRPOTrainer(
        model=make_llama(),
        reward_funcs=reward,
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"prompt": [text(i, 6) for i in range(8)]}),
        processing_class=make_tokenizer(),
        callbacks=[*callbacks],
    )


def steps_of(trainer: Any) -> list[dict[str, Any]]:
    return [{n: x for n, x in line.items() if n != "step_time"} for line in history(trainer)]


@pytest.mark.kind("TRL's GRPO, between two generations", bits=True, resumed="exact")
def test_what_was_generated_once_is_trained_on_again(tmp_path: Path) -> None:
    def kept() -> MemoryBudget:
        return MemoryBudget(None, checkpoints=tmp_path / "run", every=1)

    whole = rewarded(tmp_path)
    whole.train()
    with pytest.raises(Stopped):
        rewarded(tmp_path, kept(), Stops(3, stop)).train()
    budget = kept()
    again = rewarded(tmp_path, budget)
    again.train()
    assert budget.resumed is not None
    assert budget.resumed.step == 3
    assert budget.resumed.bit_exact, budget.resumed.inexact
    assert steps_of(again) == steps_of(whole)
    assert is_same(bits(again.model), bits(whole.model))


@pytest.mark.kind("TRL's trainers after optimize", bits=True, peak="said")
def test_the_plan_is_made_for_the_trainers_forward(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = trained(make_llama(), tmp_path)
    model = actckpt.optimize(make_llama(), None, policy="full")
    found = trained(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    said = [r.message for r in caplog.records if "without a plan" in r.message]
    assert len(said) == 1
    assert "fused_forward stands in the place of the forward" in said[0]
    assert actckpt.report(model).plan.regions  # from the second step on
