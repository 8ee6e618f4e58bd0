"""Hugging Face models as people call them: growing caches, encoder-decoders, adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.data.plan import Plan, Region
from actckpt.errors import ReplayError
from actckpt.tracing.call import Call
from tests.exact import assert_exact, enforce, halves, plan, region, saving
from tests.suite import seeded

LAYERS = 3


def ids(rows: int = 2, length: int = 6) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    found = torch.randint(3, 40, (rows, length), generator=g)
    return {"input_ids": found, "labels": found.clone()}


def gpt2(dropout: float = 0.1, **more: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=LAYERS, n_head=2, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip
    return model


def mistral() -> nn.Module:
    """Its cache has a sliding window, narrower than the batch: the width is a tensor."""
    from transformers import MistralConfig, MistralForCausalLM

    model: nn.Module = MistralForCausalLM(
        MistralConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
            sliding_window=4,
        )
    )  # fmt: skip
    return model


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    model: nn.Module = T5ForConditionalGeneration(
        T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2,
            num_heads=2, decoder_start_token_id=0,
        )
    )  # fmt: skip
    return model


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True, init_lora_weights=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(gpt2(), config)  # type: ignore[no-any-return]


def trees(prefix: str, count: int) -> list[Plan]:
    each = [region(f"{prefix}.{i}") for i in range(count)]
    return [
        plan(*each),
        plan(region(f"{prefix}.0", f"{prefix}.{count - 1}")),
        plan(halves(prefix, 0, count - 1)),
    ]


def run(model: nn.Module, call: Call) -> Any:
    """The step, and how long the cache is after it."""
    output = model(*call.args, **call.kwargs)
    output.loss.backward()
    cache = output.past_key_values
    length = torch.tensor(-1 if cache is None else cache.get_seq_length())
    return {"loss": output.loss, "logits": output.logits, "length": length}


@pytest.mark.parametrize("wanted", trees("transformer.h", LAYERS))
def test_gpt2_with_its_cache_growing(wanted: Plan) -> None:
    assert_exact(gpt2, ids, wanted, run=run)


def test_gpt2_root_and_saved_operations() -> None:
    def saved(g: Any) -> Plan:
        names = ("aten.addmm", "aten._scaled_dot_product_flash_attention_for_cpu")
        return plan(*(region(f"transformer.h.{i}", saved=saving(g, f"transformer.h.{i}", *names))
                      for i in range(LAYERS)))  # fmt: skip

    inside = region("transformer.h.0", None, region("transformer.h.0.mlp"))
    assert_exact(lambda: gpt2(0.0), ids, saved, run=run)
    assert_exact(lambda: gpt2(0.0), ids, saved, run=run, prune=True)
    assert_exact(gpt2, ids, plan(region("", None, inside, region("transformer.h.2"))), run=run)
    assert_exact(gpt2, ids, plan(region("transformer", None, region("transformer.h.1"))), run=run)


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("wanted", trees("model.layers", LAYERS))
def test_llama_and_mistral_with_their_caches_growing(
    make: Callable[[], nn.Module], wanted: Plan
) -> None:
    assert_exact(make, ids, wanted, run=run)


def test_the_dry_run_of_a_cache_with_a_sliding_window() -> None:
    """Fake tensors in the cache keep the values that they answer with."""
    model = mistral()
    actckpt.optimize(model, None, batch=ids(), policy="full")
    assert actckpt.report(model).plan.regions
    model(**ids()).loss.backward()


def test_a_second_replay_finds_the_cache_as_the_first_did() -> None:
    def twice(model: nn.Module, call: Call) -> Any:
        output = model(*call.args, **call.kwargs)
        output.loss.backward(retain_graph=True)
        output.loss.backward()
        return {"length": torch.tensor(output.past_key_values.get_seq_length())}

    assert_exact(gpt2, ids, trees("transformer.h", LAYERS)[2], run=twice)


def test_a_cache_that_the_user_passes_is_left_alone() -> None:
    from transformers import DynamicCache

    def passes(model: nn.Module, call: Call) -> Any:
        cache = DynamicCache(config=model.config)
        output = model(**call.kwargs, past_key_values=cache)
        output.loss.backward()
        lengths = [cache.get_seq_length(i) for i in range(LAYERS)]
        return {"loss": output.loss, "length": torch.tensor(lengths), "key": cache.layers[0].keys}

    for wanted in trees("transformer.h", LAYERS):
        assert_exact(gpt2, ids, wanted, run=passes)


def test_a_cache_that_is_filled_already_is_exact_or_an_error() -> None:
    """A prefix in the cache is state outside of the arguments: never a wrong gradient."""
    from transformers import DynamicCache

    make = seeded(lambda: gpt2(0.0))
    model = make()
    enforce(model, ids(), trees("transformer.h", LAYERS)[0])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids()["input_ids"][:, :3], past_key_values=cache)
    output = model(**ids(), past_key_values=cache)
    with pytest.raises(ReplayError):
        output.loss.backward()


ENCODER = "encoder.block"
DECODER = "decoder.block"


@pytest.mark.parametrize(
    "regions",
    [
        [region(f"{p}.{i}") for p in (ENCODER, DECODER) for i in range(2)],
        [halves(ENCODER, 0, 1), halves(DECODER, 0, 1)],
        [
            region("encoder", None, halves(ENCODER, 0, 1)),
            region("decoder", None, region(f"{DECODER}.1")),
        ],
        [region("encoder")],
    ],
)
def test_t5(regions: list[Region]) -> None:
    assert_exact(t5, ids, plan(*regions), run=run)


@pytest.mark.parametrize("wanted", trees("base_model.model.transformer.h", LAYERS))
def test_lora_adapters_on_a_frozen_base(wanted: Plan) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert_exact(lora, ids, wanted, run=run)


def test_every_hidden_state_returned() -> None:
    def all_states(model: nn.Module, call: Call) -> Any:
        output = model(**call.kwargs, output_hidden_states=True)
        loss = output.loss + sum(h.square().mean() for h in output.hidden_states)
        loss.backward()
        return [loss, *output.hidden_states]

    for wanted in trees("transformer.h", LAYERS):
        assert_exact(gpt2, ids, wanted, run=all_states)


def test_eager_attention_with_its_weights_returned() -> None:
    def weights(model: nn.Module, call: Call) -> Any:
        output = model(**call.kwargs, output_attentions=True)
        (output.loss + output.attentions[0].square().mean()).backward()
        return [output.loss, *output.attentions]

    for wanted in trees("transformer.h", LAYERS):
        assert_exact(
            lambda: gpt2(attn_implementation="eager"),
            lambda: {**ids(), "output_attentions": True},
            wanted,
            run=lambda m, c: weights(
                m, Call(**{k: v for k, v in c.kwargs.items() if k != "output_attentions"})
            ),
        )
