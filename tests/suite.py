"""The models that every policy is tested on, and one real training step of each.

Weights are random and small; activations are many times the size of the parameters, so that a
budget means something. Nothing comes from a hub. `build` and `batch` are seeded and leave the
global random state as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.models.custom_function import CustomFunctionModel
from tests.models.densenet import DenseNet
from tests.models.lstm import LSTMLanguageModel
from tests.models.mlp import MLP
from tests.models.siamese import Siamese
from tests.models.unet import UNet

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with a small learning rate."""
    return torch.optim.AdamW(parameters, lr=1e-3)


@dataclass(frozen=True, slots=True)
class Case:
    """One model, one batch and how a step of it is made.

    Args:
        build: the model, in train mode.
        batch: a dict (keyword arguments), a tuple (positional) or a tensor (the only argument).
        loss_fn: loss of the model's output; None where the output is, or has, a loss.
        micro_steps: forward-backward passes per optimizer step, each on a batch of the same shapes.
        tags: ``hf``, ``own``, ``random`` (draws random numbers), ``batchnorm`` (buffers move),
            ``cache`` (fills a key-value cache), ``tied``, ``frozen``, ``bf16``.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss_fn: Callable[[Any], torch.Tensor] | None = None
    autocast: bool = False
    micro_steps: int = 1
    clip: bool = False
    optimizer: MakeOptimizer | None = adamw
    tags: frozenset[str] = field(default_factory=frozenset)


def step(
    case: Case, model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer | None = None
) -> torch.Tensor:
    """The mean loss over the micro-steps of one real training step, detached.

    The gradients stay for the caller to read, clipped where the case clips. The output stays
    referenced until backward has ended, as in ``out = model(x)`` of a user's loop.
    """
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for i in range(case.micro_steps):
        part = batch if i == 0 else rolled(batch, i)
        with torch.autocast(device.type, torch.bfloat16, enabled=case.autocast):
            output = call(model, part)
            loss = loss_of(case, output)
            if case.micro_steps > 1:
                loss = loss / case.micro_steps
        loss.backward()
        total = total + loss.detach()
        del output, loss  # the next micro-step begins without them
    if case.clip:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if optimizer is not None:
        optimizer.step()
    return total


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def rolled(batch: Any, shift: int) -> Any:
    """Another batch of the same shapes: every tensor turned along its last dimension."""
    if isinstance(batch, torch.Tensor):
        return batch.roll(shift, -1)
    if isinstance(batch, Mapping):
        return {key: rolled(value, shift) for key, value in batch.items()}
    return tuple(rolled(v, shift) for v in batch) if isinstance(batch, tuple) else batch


def loss_of(case: Case, output: Any) -> torch.Tensor:
    """The scalar that backward starts from."""
    if case.loss_fn is not None:
        return case.loss_fn(output)
    if isinstance(output, torch.Tensor):
        return output
    loss: torch.Tensor = output["loss"]
    return loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every gradient that is not None, by parameter name."""
    return {
        name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None
    }


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer is given."""
    return [p for p in model.parameters() if p.requires_grad]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> Callable[[], nn.Module]:
    """``make`` under its own seed, its result in train mode; global random state is restored."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make().train()

    return build


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Batches


def tokens(batch: int, length: int, vocab: int = 256, **more: Any) -> Callable[[], dict[str, Any]]:
    """Token ids, the same ids as labels, and further keyword arguments."""

    def make() -> dict[str, Any]:
        ids = torch.randint(3, vocab, (batch, length), generator=generator())
        return {"input_ids": ids, "labels": ids.clone(), **more}

    return make


def masked_tokens(batch: int, length: int, vocab: int = 256) -> Callable[[], dict[str, Any]]:
    """Padded token ids with 15 % of the labels kept, as in masked language modelling."""

    def make() -> dict[str, Any]:
        g = generator()
        ids = torch.randint(3, vocab, (batch, length), generator=g)
        labels = torch.where(torch.rand(ids.shape, generator=g) < 0.15, ids, -100)
        keep = torch.arange(length) < torch.linspace(length, length // 2, batch).long()[:, None]
        return {
            "input_ids": ids,
            "attention_mask": keep.long(),
            "labels": torch.where(keep, labels, -100),
        }

    return make


def seq2seq(batch: int, source: int, target: int, vocab: int = 256) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        g = generator()
        return {
            "input_ids": torch.randint(3, vocab, (batch, source), generator=g),
            "labels": torch.randint(3, vocab, (batch, target), generator=g),
        }

    return make


def pixels(batch: int, size: int, classes: int = 10) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        g = generator()
        return {
            "pixel_values": torch.randn(batch, 3, size, size, generator=g),
            "labels": torch.randint(classes, (batch,), generator=g),
        }

    return make


def normal(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape, generator=generator())


# Losses


def half_square(output: torch.Tensor) -> torch.Tensor:
    return 0.5 * output.float().square().mean()


def classes_loss(*shape: int, classes: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Cross-entropy against labels that the function closes over; classes are dimension 1."""
    labels = torch.randint(classes, shape, generator=generator(2))
    return lambda output: nn.functional.cross_entropy(output.float(), labels.to(output.device))


def every_layer_loss(output: Any) -> torch.Tensor:
    """The model's loss and a penalty on what every layer put out."""
    penalty = torch.stack([h.square().mean() for h in output.hidden_states]).mean()
    loss: torch.Tensor = output.loss + 0.01 * penalty
    return loss


# Hugging Face models


def gpt2(dropout: float = 0.0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=128,
            n_embd=64,
            n_layer=6,
            n_head=4,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    )


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=256,
            hidden_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=128,
        )
    )


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=32,
            patch_size=4,
            hidden_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=256,
            num_labels=10,
        )
    )


def resnet() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16,
            hidden_sizes=[32, 64, 96, 128],
            depths=[2, 2, 2, 2],
            layer_type="bottleneck",
            num_labels=10,
        )
    )


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=256,
            d_model=64,
            d_kv=16,
            d_ff=256,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def mixtral() -> Any:
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    # the default; "eager" loops over the experts that were hit, with shapes that depend on data
    config._experts_implementation = "grouped_mm"
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    # random instead of zero B matrices, so that A gets gradients in the first step
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.05,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft 0.21 reads what transformers 5 renamed
        return get_peft_model(gpt2(), config)


def _case(
    name: str, make: Callable[[], nn.Module], batch: Callable[[], Any], *tags: str, **more: Any
) -> Case:
    return Case(name, seeded(make), batch, tags=frozenset(tags), **more)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        # Hugging Face
        _case("gpt2", gpt2, tokens(8, 128), "hf", "tied", "cache"),
        _case("llama", llama, tokens(8, 128), "hf", "cache"),
        _case("bert", bert, masked_tokens(8, 128), "hf", "tied", "random"),
        _case("vit", vit, pixels(16, 32), "hf"),
        _case("resnet", resnet, pixels(16, 96), "hf", "batchnorm"),
        _case("t5", t5, seq2seq(8, 64, 64), "hf", "tied", "cache", "random"),
        _case("mixtral", mixtral, tokens(8, 128), "hf", "cache", "bf16"),
        # own
        _case("mlp64", MLP, normal(1024, 64), "own", loss_fn=half_square),
        _case(
            "unet",
            UNet,
            normal(8, 3, 64, 64),
            "own",
            "batchnorm",
            loss_fn=classes_loss(8, 64, 64, classes=4),
        ),
        _case(
            "densenet",
            DenseNet,
            normal(16, 3, 32, 32),
            "own",
            "batchnorm",
            loss_fn=classes_loss(16, classes=10),
        ),
        _case(
            "lstm",
            LSTMLanguageModel,
            lambda: torch.randint(256, (16, 64), generator=generator()),
            "own",
            "tied",
            "random",
        ),
        # variants
        _case("lora", lora, tokens(8, 128), "hf", "tied", "cache", "frozen", "random"),
        _case("gpt2_dropout", lambda: gpt2(0.1), tokens(8, 128), "hf", "tied", "cache", "random"),
        _case("autocast", gpt2, tokens(8, 128), "hf", "tied", "cache", "bf16", autocast=True),
        _case("accumulate", gpt2, tokens(6, 128), "hf", "tied", "cache", micro_steps=2),
        _case("clip", llama, tokens(8, 128), "hf", "cache", clip=True),
        _case(
            "hidden_states",
            gpt2,
            tokens(8, 128, output_hidden_states=True),
            "hf",
            "tied",
            "cache",
            loss_fn=every_layer_loss,
        ),
        _case(
            "custom_function",
            CustomFunctionModel,
            normal(1024, 64),
            "own",
            loss_fn=classes_loss(1024, classes=16),
        ),
        _case(
            "siamese",
            Siamese,
            lambda: tuple(torch.randn(2, 1536, 48, generator=generator()).unbind()),
            "own",
            "random",
        ),
    )
}
