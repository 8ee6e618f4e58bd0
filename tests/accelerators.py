"""Small models, traced as an accelerator that is not here would run them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from actckpt.commands.targets import load_target
from actckpt.data.graph import Graph
from actckpt.profiler.devices import DEVICES
from actckpt.tracing.call import Call
from actckpt.tracing.optimizing import optimizers_of
from actckpt.tracing.step import Step
from actckpt.tracing.tracer import trace_step
from actckpt.tracing.weightless import without_weights

SMALL = {
    "gpt2": {"n_layer": "3", "n_embd": "64", "n_head": "4", "vocab_size": "256"},
    "llama": {
        "num_hidden_layers": "3", "hidden_size": "64", "intermediate_size": "128",
        "num_attention_heads": "4", "num_key_value_heads": "2", "vocab_size": "256",
    },
    "vit": {
        "num_hidden_layers": "3", "hidden_size": "64", "num_attention_heads": "4",
        "intermediate_size": "128", "image_size": "64", "num_labels": "5",
    },
}  # fmt: skip


def load(name: str, dtype: str | None = "bf16") -> tuple[nn.Module, Any]:
    return load_target(name, overrides=SMALL[name], batch_size=4, seq_len=128, dtype=dtype)


def step_for(device: str, batch: Any, model: nn.Module | None = None) -> Step:
    optimizer = torch.optim.AdamW(model.parameters()) if model is not None else None
    return Step(
        Call.of(batch), optimizers=optimizers_of(optimizer), stand_in=DEVICES[device].stand_in
    )


def traced(name: str, device: str, dtype: str | None = "bf16") -> Graph:
    with without_weights():
        model, batch = load(name, dtype)
    return trace_step(model, step_for(device, batch))


def saved_bytes(graph: Graph) -> int:
    saved = {graph.values[s.value].storage for s in graph.saves if not s.held}
    return sum(graph.storages[sid].bytes for sid in saved if graph.storages[sid].born >= 0)


def names(graph: Graph) -> Counter[str]:
    return Counter(op.name.split(".")[1] for op in graph.ops)
