"""The models that are run on a GPU, at real sizes; small ones where the environment asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from tests.models.unet import UNet

# blocks that torch's function is put around
BLOCKS = frozenset(
    {"GPT2Block", "LlamaDecoderLayer", "ViTLayer", "ResNetBottleNeckLayer", "DoubleConv"}
)
QUICK = "ACTCKPT_EXPERIMENT_QUICK"  # read where `actckpt plan` builds a model

Built = tuple[nn.Module, dict[str, torch.Tensor]]


class WithLoss(nn.Module):
    """A model with its loss, as those of Hugging Face have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.model(pixel_values), labels)}


def gpt2() -> Built:
    from transformers import AutoModelForCausalLM, GPT2Config

    layers, width, batch, length = (3, 64, 2, 64) if _quick() else (24, 1024, 8, 1024)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model, _tokens(batch, length, config.vocab_size)


def llama() -> Built:
    from transformers import AutoModelForCausalLM, LlamaConfig

    layers, width, batch, length = (3, 128, 2, 64) if _quick() else (16, 2048, 4, 2048)
    config = LlamaConfig(
        vocab_size=1024 if _quick() else 128256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model, _tokens(batch, length, config.vocab_size)


def vit() -> Built:
    from transformers import AutoModelForImageClassification, ViTConfig

    layers, width, batch = (3, 64, 2) if _quick() else (24, 1024, 64)
    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 64,
        num_labels=1000,
    )
    model = AutoModelForImageClassification.from_config(config, dtype=torch.bfloat16)
    return model, _pixels(batch, 224, 1000, torch.bfloat16)


def resnet152() -> Built:
    from transformers import ResNetConfig, ResNetForImageClassification

    depths, batch, size = ([1, 1, 2, 1], 2, 64) if _quick() else ([3, 8, 36, 3], 64, 224)
    model = ResNetForImageClassification(ResNetConfig(depths=depths, num_labels=1000))
    return model, _pixels(batch, size, 1000, torch.float32)


def unet() -> Built:
    width, depth, batch, size = (8, 3, 2, 64) if _quick() else (64, 4, 4, 512)
    inputs = _pixels(batch, size, 4, torch.float32)
    inputs["labels"] = torch.randint(4, (batch, size, size))
    return WithLoss(UNet(width=width, depth=depth)), inputs


MODELS: dict[str, tuple[str, Callable[[], Built], str]] = {
    "gpt2": ("GPT-2 medium, bf16, 8 x 1024 tokens, dropout 0.1", gpt2, "adamw"),
    "llama": ("Llama of 1.2 B parameters, bf16, 4 x 2048 tokens", llama, "adamw"),
    "vit": ("ViT-L/16, bf16, 64 images of 224 x 224", vit, "adamw"),
    "resnet152": ("ResNet-152, float32, 64 images of 224 x 224", resnet152, "sgd"),
    "unet": ("U-Net, 4 levels from width 64, float32, 4 images of 512 x 512", unet, "adamw"),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


def _quick() -> bool:
    return QUICK in os.environ


def _tokens(batch: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (batch, length))
    return {"input_ids": ids, "labels": ids.clone()}


def _pixels(batch: int, size: int, classes: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    images = torch.randn(batch, 3, size, size).to(dtype)
    return {"pixel_values": images, "labels": torch.randint(classes, (batch,))}
