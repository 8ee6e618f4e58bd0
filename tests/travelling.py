"""Tiny models whose weights travel, and two inputs of different shapes for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

VOCABULARY = 40
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Traveller:
    """A kind of model: how it is made, and what it is given."""

    make: Callable[[], nn.Module]
    inputs: tuple[Inputs, Inputs]

    def __call__(self) -> nn.Module:
        """A model in training mode whose every weight counts."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.train()

    def outputs(self, model: nn.Module) -> list[torch.Tensor]:
        """What a model in evaluation mode makes of both inputs."""
        was = model.training
        model.eval()
        with torch.no_grad():
            found = [_first(model(**given)) for given in self.inputs]
        model.train(was)
        return found


def _first(output: Any) -> torch.Tensor:
    found = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    tensor: torch.Tensor = output[0] if found is None else found
    return tensor


def _tokens(rows: int, columns: int, **more: int) -> Inputs:
    def some(*shape: int) -> torch.Tensor:
        count = rows * columns
        return (torch.arange(count) * 7 % (VOCABULARY - 3) + 3).reshape(shape)

    return {"input_ids": some(rows, columns), **{k: some(rows, columns) for k in more}}


def _images(rows: int) -> Inputs:
    return {"pixel_values": torch.linspace(-1, 1, rows * 3 * 64).reshape(rows, 3, 8, 8)}


def gpt2(**more: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**{**size, **ids, **more}))


def llama(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**size, **more}))


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    size = {
        "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32,
        "num_attention_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 32,
    }  # fmt: skip
    return BertForMaskedLM(BertConfig(**size))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **size)
    return T5ForConditionalGeneration(config)


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "num_labels": 5}
    return ViTForImageClassification(ViTConfig(**size, **heads))


def resnet() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    size = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=5, **size))


class Own(nn.Module):
    """Tied, with buffers of both kinds, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((), 1.5))
        self.register_buffer("shift", torch.full((8,), 0.25), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = self.embed(input_ids) * self.scale + self.shift
        hidden = self.norm(rows.transpose(1, 2)).transpose(1, 2)
        logits: torch.Tensor = self.head(self.drop(torch.tanh(hidden)))
        return logits


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model: nn.Module = get_peft_model(llama(), config)
    return model


_TEXT = (_tokens(2, 5), _tokens(3, 7))
TRAVELLERS = {
    "gpt2": Traveller(gpt2, _TEXT),
    "llama": Traveller(llama, _TEXT),
    "bert": Traveller(bert, _TEXT),
    "t5": Traveller(t5, (_tokens(2, 5, decoder_input_ids=1), _tokens(3, 7, decoder_input_ids=1))),
    "vit": Traveller(vit, (_images(2), _images(3))),
    "resnet": Traveller(resnet, (_images(2), _images(3))),
    "own": Traveller(Own, _TEXT),
    "lora": Traveller(lora, _TEXT),
}
