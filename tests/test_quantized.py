"""Frozen weights in a few bits under adapters: parameters of their own classes, traced as such."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from tests.budgets import outcome_of

# torchao and peft tell what they lack when they are imported or wrap a layer
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def llama() -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config.use_cache = False
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.requires_grad_(False)


def adapted(model: nn.Module, **more: Any) -> nn.Module:
    """Low-rank adapters that draw dropout, the only parameters that are trained."""
    peft: Any = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_dropout=0.1,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        **more,
    )
    wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped.train()


def layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of every linear layer but the head."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                yield parent, name, child


def four_bits(**more: Any) -> nn.Module:
    bnb: Any = pytest.importorskip("bitsandbytes")
    model = llama()
    for parent, name, layer in layers(model):
        made = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32
        )
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        setattr(parent, name, made.to("cpu"))
    return adapted(model, **more)


def eight_bits() -> nn.Module:
    bnb: Any = pytest.importorskip("bitsandbytes")
    model = llama()
    for parent, name, layer in layers(model):
        made = bnb.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias=False, has_fp16_weights=False
        )
        made.weight = bnb.nn.Int8Params(
            layer.weight.data, requires_grad=False, has_fp16_weights=False
        )
        setattr(parent, name, made.to("cpu"))
    return adapted(model)


def wrapped_int8() -> nn.Module:
    quantization: Any = pytest.importorskip("torchao.quantization")
    model: Any = llama()
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    return adapted(model)


MAKERS = {
    "nf4": four_bits,
    "nf4 with DoRA": lambda: four_bits(use_dora=True),
    "int8": eight_bits,
    "int8 of torchao": wrapped_int8,
}


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(200, (4, 64), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.kind("weights in 4 or 8 bits", bits=True, peak="within")
@pytest.mark.parametrize(
    ("name", "share"),
    [("nf4", 0.4), ("nf4 with DoRA", 0.5), ("int8", 0.6), ("int8 of torchao", 0.5)],
)
def test_adapters_on_quantized_weights(name: str, share: float) -> None:
    batch = tokens()

    def step(model: nn.Module) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            loss: torch.Tensor = model(**batch).loss
            loss.backward()
        return loss

    found = outcome_of(MAKERS[name], batch, step, share=share)
    assert found.exact_and_within, found


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_planning_leaves_what_a_weight_means_as_it_was(name: str) -> None:
    model = MAKERS[name]()

    def state() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, module in model.named_modules():
            for key, p in module._parameters.items():
                if p is not None:
                    found[f"{path}.{key}"] = (p, type(p), dict(p.__dict__))
            for key, value in module.__dict__.items():
                if type(value).__module__.startswith("bitsandbytes"):
                    found[f"{path}.{key}"] = (value, dict(vars(value)))
        return found

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, (dict, tuple)):
            pairs = (
                zip(a.values(), b.values(), strict=True)
                if isinstance(a, dict)
                else zip(a, b, strict=True)
            )
            return len(a) == len(b) and all(same(x, y) for x, y in pairs)
        return a is b

    before = state()
    actckpt.optimize(model, 1.0, batch=tokens())
    after = state()
    assert before.keys() == after.keys()
    assert all(same(before[key], after[key]) for key in before)
    assert "_make_subclass" not in torch.Tensor.__dict__
