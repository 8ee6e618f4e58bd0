"""The deep models: where recomputing each block once is not little enough memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from experiments.peers.gpt2 import gpt2_of
from experiments.peers.subject import Subject, listed, numbered
from tests.suite import normal, pixels, seq2seq, tokens

VOCABULARY = 8192
CLASSES = 10


def gpt2_36(quick: bool) -> Subject:
    return gpt2_of(12 if quick else 36, batch=1, heads=4, vocabulary=VOCABULARY)


def llama_32(quick: bool) -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = 12 if quick else 32
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Subject(
        f"{layers} layers of width 256, 1 x 256 tokens",
        LlamaForCausalLM(config),
        tokens(1, 256, VOCABULARY)(),
        numbered("model.layers", layers),
        listed("model", "layers"),
    )


def vit_24(quick: bool) -> Subject:
    from transformers import ViTConfig, ViTForImageClassification

    layers = 12 if quick else 24
    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=256,
        intermediate_size=1024,
        num_attention_heads=4,
        num_labels=CLASSES,
    )
    return Subject(
        f"{layers} layers of width 256, 2 x 197 patches",
        ViTForImageClassification(config),
        pixels(2, 224)(),
        numbered("vit.layers", layers),
        listed("vit", "layers"),
    )


def t5_12(quick: bool) -> Subject:
    from transformers import T5Config, T5ForConditionalGeneration

    layers = 4 if quick else 12
    config = T5Config(
        vocab_size=1024,
        d_model=256,
        d_kv=64,
        d_ff=1024,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return Subject(
        f"{layers} + {layers} layers of width 256, 1 x 256 + 192 tokens",
        T5ForConditionalGeneration(config),
        seq2seq(1, 256, 192, 1024)(),
        (*numbered("encoder.block", layers), *numbered("decoder.block", layers)),
    )


class PreActivation(nn.Module):
    """A bottleneck of three convolutions, each after its norm; the input is added at the end."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(nn.functional.relu(self.norm1(x)))
        y = self.conv2(nn.functional.relu(self.norm2(y)))
        y = self.conv3(nn.functional.relu(self.norm3(y)))
        out: torch.Tensor = y + (x if self.shortcut is None else self.shortcut(x))
        return out


class PreActivationResNet(nn.Module):
    """He and others' residual network of 3 x 3 x ``blocks`` + 2 layers, for small images.

    Args:
        blocks: in each of three groups, each of half the pixels of the one before.

    References:
        He, Zhang, Ren, Sun 2016, Identity mappings in deep residual networks.
        Chen, Xu, Zhang, Guestrin 2016, Training deep nets with sublinear memory cost, section 5
        (1,001 layers).
    """

    def __init__(self, blocks: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        inputs = width
        for group in range(3):
            for block in range(blocks):
                size = width * 2**group
                stride = 2 if group and not block else 1
                self.blocks.append(PreActivation(inputs, size, stride))
                inputs = 4 * size
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = nn.functional.relu(self.norm(x)).mean((2, 3))
        out: torch.Tensor = self.head(x)
        return out


def resnet_101(quick: bool) -> Subject:
    return residual(3 if quick else 11, batch=16, size=32)


def residual(blocks: int, batch: int, size: int) -> Subject:
    """A pre-activation ResNet with so many blocks in each group."""
    model = PreActivationResNet(blocks)
    return Subject(
        f"{9 * blocks + 2} layers from width 16, {batch} x {size} x {size} pixels",
        model,
        normal(batch, 3, size, size)(),
        numbered("blocks", 3 * blocks),
        listed("", "blocks"),
        torch.arange(batch) % CLASSES,
    )


DEEP: dict[str, Callable[[bool], Subject]] = {
    "gpt2_36": gpt2_36,
    "llama_32": llama_32,
    "vit_24": vit_24,
    "t5_12": t5_12,
    "resnet_101": resnet_101,
}
