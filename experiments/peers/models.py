"""The models: random weights, nothing from a hub, activations many times the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from experiments.peers.deep import DEEP
from experiments.peers.gpt2 import gpt2_of
from experiments.peers.subject import Chain, Subject, listed, numbered
from tests.models.densenet import DenseBlock, DenseNet
from tests.models.unet import UNet
from tests.suite import generator, masked_tokens, normal, pixels, seq2seq, tokens

SEED = 0
VOCABULARY = 1024


def built(name: str, *, quick: bool) -> Subject:
    """The subject, the same weights and batch each time.

    Args:
        quick: sizes that take about a quarter of the time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        subject = EVERY[name](quick)
    subject.model.train()
    for module in subject.model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            # torch's function would fill the key-value cache a second time in the replay
            config.use_cache = False
    return subject


def gpt2(quick: bool) -> Subject:
    layers, batch = (4, 2) if quick else (8, 4)
    return gpt2_of(layers, batch, heads=8, vocabulary=VOCABULARY)


def llama(quick: bool) -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, batch = (4, 2) if quick else (8, 4)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    return Subject(
        f"{layers} layers of width 256, {batch} x 256 tokens",
        LlamaForCausalLM(config),
        tokens(batch, 256, VOCABULARY)(),
        numbered("model.layers", layers),
        listed("model", "layers"),
    )


def bert(quick: bool) -> Subject:
    from transformers import BertConfig, BertForMaskedLM

    layers, batch = (4, 2) if quick else (8, 3)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=1024,
        max_position_embeddings=256,
    )
    return Subject(
        f"{layers} layers of width 256, {batch} x 256 tokens, dropout 0.1",
        BertForMaskedLM(config),
        masked_tokens(batch, 256, VOCABULARY)(),
        numbered("bert.encoder.layer", layers),
        listed("bert.encoder", "layer"),
    )


def vit(quick: bool) -> Subject:
    from transformers import ViTConfig, ViTForImageClassification

    layers, batch = (4, 2) if quick else (8, 4)
    config = ViTConfig(
        image_size=64,
        patch_size=4,
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=1024,
        num_labels=10,
    )
    return Subject(
        f"{layers} layers of width 256, {batch} x 257 patches",
        ViTForImageClassification(config),
        pixels(batch, 64)(),
        numbered("vit.layers", layers),
        listed("vit", "layers"),
    )


def t5(quick: bool) -> Subject:
    from transformers import T5Config, T5ForConditionalGeneration

    layers, batch = (2, 2) if quick else (4, 3)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=256,
        d_kv=32,
        d_ff=1024,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=8,
        decoder_start_token_id=0,
    )
    return Subject(
        f"{layers} + {layers} layers of width 256, {batch} x 256 + 192 tokens, dropout 0.1",
        T5ForConditionalGeneration(config),
        seq2seq(batch, 256, 192, VOCABULARY)(),
        (*numbered("encoder.block", layers), *numbered("decoder.block", layers)),
    )


def mixtral(quick: bool) -> Subject:
    from transformers import AutoModelForCausalLM, MixtralConfig

    layers, batch = (3, 2) if quick else (6, 4)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    # the default; "eager" loops over the experts that were hit, with shapes that depend on data
    config._experts_implementation = "grouped_mm"
    return Subject(
        f"{layers} layers of width 192, 4 experts, {batch} x 256 tokens, bf16",
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16),
        tokens(batch, 256, VOCABULARY)(),
        numbered("model.layers", layers),
        listed("model", "layers"),
    )


def resnet50(quick: bool) -> Subject:
    from transformers import ResNetConfig, ResNetForImageClassification

    batch, size = (8, 64) if quick else (16, 96)
    depths = (3, 4, 6, 3)
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[128, 256, 512, 1024],
        depths=list(depths),
        layer_type="bottleneck",
        num_labels=10,
    )
    return Subject(
        f"half as wide, {batch} x {size} x {size} pixels",
        ResNetForImageClassification(config),
        pixels(batch, size)(),
        tuple(
            path
            for stage, depth in enumerate(depths)
            for path in numbered(f"resnet.encoder.stages.{stage}.layers", depth)
        ),
        lambda model: Chain(
            "resnet.encoder",
            "stages",
            tuple(
                layer
                for stage in model.get_submodule("resnet.encoder.stages").children()
                for layer in stage.get_submodule("layers").children()
            ),
        ),
    )


def densenet121(quick: bool) -> Subject:
    depths, batch = ((3, 6, 12, 8), 12) if quick else ((6, 12, 24, 16), 16)
    model = DenseNet(growth=12, blocks=depths, width=24)
    parts = dict(model.parts.named_children())
    return Subject(
        f"blocks of {', '.join(map(str, depths))} layers, growth 12, {batch} x 32 x 32 pixels",
        model,
        normal(batch, 3, 32, 32)(),
        tuple(
            path
            for number, part in parts.items()
            for path in (
                numbered(f"parts.{number}.layers", len(part.layers))
                if isinstance(part, DenseBlock)
                else (f"parts.{number}",)
            )
        ),
        listed("", "parts"),
        _classes((batch,), 10),
    )


def unet(quick: bool) -> Subject:
    depth, batch, size = (3, 2, 96) if quick else (4, 6, 128)
    return Subject(
        f"{depth} levels from width 16, {batch} x {size} x {size} pixels",
        UNet(width=16, depth=depth),
        normal(batch, 3, size, size)(),
        (*numbered("down", depth), "bottom", *numbered("up", depth)),
        target=_classes((batch, size, size), 4),
    )


MODELS: dict[str, Callable[[bool], Subject]] = {
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "vit": vit,
    "t5": t5,
    "mixtral": mixtral,
    "resnet50": resnet50,
    "densenet121": densenet121,
    "unet": unet,
}


EVERY = MODELS | DEEP


def _classes(shape: Sequence[int], classes: int) -> torch.Tensor:
    return torch.randint(classes, tuple(shape), generator=generator(2))
