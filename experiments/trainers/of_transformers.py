"""Cases of transformers' Trainer and what is built on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from actckpt.integrations.transformers import MemoryBudget
from experiments.trainers.outcome import Outcome, digest
from tests.trainer_models import Texts, make_llama, make_lora, make_tokenizer, text

SETTINGS: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
    "dataloader_pin_memory": False,
    "dataloader_num_workers": 2,
    "bf16": True,
}
_METERED = 4  # steps of a process up to which peaks are measured
Build = Callable[..., Any]


class _Watch(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps losses and peaks, and stops the training in the middle of a step."""

    def __init__(self, outcome: Outcome, kill_after: int | None, stop: Callable[[], None]) -> None:
        self._outcome = outcome
        self._stop = stop
        self._kill_after = kill_after
        self._steps = 0
        self._step: AbstractContextManager[None] | None = None
        self.others: tuple[Any, ...] = ()

    def state(self) -> dict[str, Any]:
        """What it keeps is of no consequence for the training."""
        return {"args": {}, "attributes": {}}

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any
    ) -> None:
        self._steps += 1
        if 1 < self._steps <= _METERED:  # planning is no part of a step
            self._step = self._outcome.step(model, optimizer.optimizer, *self.others)
            self._step.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._kill_after:
            self._stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(None, None, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self._outcome.losses[str(state.global_step)] = logs["loss"]


def kill() -> None:
    """Ends this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def trained(
    build: Build,
    folder: Path,
    budget_gb: float | None,
    kill_after: int | None,
    *,
    stop: Callable[[], None] = kill,
    **settings: Any,
) -> Outcome:
    """Trains with `MemoryBudget`, or without where there is no budget.

    Args:
        kill_after: optimizer steps, in the middle of the next of which it is stopped.
        settings: other ones than the case's own.
    """
    outcome = Outcome()
    trainer = build(folder, **settings)
    watch = _Watch(outcome, kill_after, stop)
    watch.others = tuple(x for x in [getattr(trainer, "ref_model", None)] if x is not None)
    budget = None
    if budget_gb is not None:
        budget = MemoryBudget(budget_gb, checkpoints=folder / "run", every=1, policy="calls")
        trainer.add_callback(budget)
    trainer.add_callback(watch)
    trainer.train()
    outcome.weights = digest(trainer.model)
    if budget is not None and budget.resumed is not None:
        outcome.resumed, outcome.inexact = budget.resumed.step, budget.resumed.inexact
    return outcome


def lora(folder: Path, **settings: Any) -> Any:
    """Trainer with LoRA, bf16, accumulation, shuffling and two workers."""
    arguments = TrainingArguments(str(folder), **{**SETTINGS, **settings})
    return Trainer(make_lora(4, 64), arguments, train_dataset=Texts(18, 64))


def sft(folder: Path, **settings: Any) -> Any:
    """TRL's supervised fine-tuning of texts of several lengths."""
    import datasets
    import trl

    texts = [text(i, 20 + 5 * (i % 5)) for i in range(18)]
    return trl.SFTTrainer(
        model=make_lora(4, 64),
        args=trl.SFTConfig(
            str(folder), max_length=64, activation_checkpointing=False, **{**SETTINGS, **settings}
        ),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=make_tokenizer(),
    )


def packed(folder: Path, **settings: Any) -> Any:
    """The same, packed: batches are told apart by their position ids alone."""
    return sft(folder, **{"packing": True, "num_train_epochs": 4, **settings})


def dpo(folder: Path, **settings: Any) -> Any:
    """TRL's DPO of a whole model, beside a reference model."""
    import datasets
    import trl

    rows = {
        "prompt": [text(i, 10) for i in range(18)],
        "chosen": [text(i + 1, 20 + i % 3) for i in range(18)],
        "rejected": [text(i + 2, 24 - i % 3) for i in range(18)],
    }
    return trl.DPOTrainer(
        model=make_llama(4, 64, attention_dropout=0.1),
        ref_model=make_llama(4, 64, attention_dropout=0.1),
        args=trl.DPOConfig(
            str(folder), max_length=64, activation_checkpointing=False, **{**SETTINGS, **settings}
        ),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=make_tokenizer(),
    )


def _sentences(folder: Path, make_loss: Callable[[Any], Any], settings: Any) -> Any:
    import datasets
    import sentence_transformers
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(7)
    where = folder / "bert"
    make_tokenizer().save_pretrained(where)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
    )
    transformers.BertModel(config).save_pretrained(where)
    words = modules.Transformer(str(where))
    pooling = modules.Pooling(words.get_embedding_dimension())
    model = sentence_transformers.SentenceTransformer(modules=[words, pooling], device="cpu")
    rows = {
        "anchor": [text(i, 12) for i in range(36)],
        "positive": [text(i + 1, 30) for i in range(36)],
    }
    given = {**SETTINGS, "per_device_train_batch_size": 4, **settings}
    return sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=sentence_transformers.SentenceTransformerTrainingArguments(str(folder), **given),
        train_dataset=datasets.Dataset.from_dict(rows),
        loss=make_loss(model),
    )


def bi_encoder(folder: Path, **settings: Any) -> Any:
    """sentence-transformers: two forwards, and one backward over both."""
    from sentence_transformers.sentence_transformer import losses

    return _sentences(folder, losses.MultipleNegativesRankingLoss, settings)


def cached(folder: Path, **settings: Any) -> Any:
    """sentence-transformers' GradCache: forwards without gradients, and again in a hook."""
    from sentence_transformers.sentence_transformer import losses

    return _sentences(
        folder,
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
        settings,
    )


# what a user adds to a script that trains: an import, and the callback
LINES = 2
# a case, and the share of what a step adds that its budget leaves: TRL's losses take most of it
CASES: dict[str, tuple[Build, float]] = {
    "Trainer, LoRA": (lora, 0.75),
    "TRL SFT": (sft, 0.85),
    "TRL SFT, packed": (packed, 0.75),
    "TRL DPO, reference model": (dpo, 0.9),
    "sentence-transformers, two forwards": (bi_encoder, 0.85),
    "sentence-transformers, GradCache": (cached, 0.75),
}
