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
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.usefixtures("flat_profile"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def make() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=60,
        eos_token_id=61,
    )
    return transformers.LlamaForCausalLM(config)


def tokenizer() -> Any:
    vocab = {f"w{i}": i for i in range(60)} | {"<pad>": 60, "<eos>": 61, "<unk>": 62}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def trained(model: Any, folder: Path) -> list[torch.Tensor]:
    texts = [" ".join(f"w{(i * 7 + j) % 60}" for j in range(20)) for i in range(6)]
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
        gradient_checkpointing=False,
        seed=1,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
    )
    trainer.train()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.kind("TRL's trainers after optimize", bits=True, peak="said")
def test_the_plan_is_made_for_the_trainers_forward(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = trained(make(), tmp_path)
    model = actckpt.optimize(make(), None, policy="full")
    found = trained(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    said = [r.message for r in caplog.records if "without a plan" in r.message]
    assert len(said) == 1
    assert "fused_forward stands in the place of the forward" in said[0]
    assert actckpt.report(model).plan.regions  # from the second step on
