"""How a model of transformers is laid out in a GGUF file: names, turned matrices, metadata.

What is not mapped is refused by its name: a reader would ignore it, or refuse the file.

References:
    The layouts are those that llama.cpp reads: https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from actckpt.errors import WeightsExportError
from actckpt.exporting.source import Source

# of ggml: a name with its terminating zero, and dimensions
MAX_NAME_BYTES = 64
MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class Turn:
    """A way in which a file has a tensor otherwise than the model, and back."""

    out: Callable[[torch.Tensor], torch.Tensor]
    back: Callable[[torch.Tensor], torch.Tensor]


AS_IT_IS = Turn(lambda x: x, lambda x: x)
# of a Conv1D, whose weight is that of a Linear turned
TRANSPOSED = Turn(lambda x: x.t().contiguous(), lambda x: x.t().contiguous())


def rotary(heads: int) -> Turn:
    """Pairs of rotated rows side by side; the model has the halves of each head one after other."""

    def out(x: torch.Tensor) -> torch.Tensor:
        halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
        return halves.transpose(1, 2).reshape(x.shape)

    def back(x: torch.Tensor) -> torch.Tensor:
        pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
        return pairs.transpose(1, 2).reshape(x.shape)

    return Turn(out, back)


@dataclass(frozen=True, slots=True)
class Laid:
    """One tensor of the file: its name there, that of the weight, and how it is turned."""

    name: str
    weight: str
    turn: Turn = AS_IT_IS


@dataclass(frozen=True, slots=True)
class Layout:
    """A file without its vocabulary.

    Args:
        architecture: as llama.cpp calls it.
        tensors: in the order of the file.
        metadata: key without the architecture, and value.
        made: tensors that are computed from the configuration.
    """

    architecture: str
    tensors: tuple[Laid, ...]
    metadata: Mapping[str, int | float | str]
    made: Mapping[str, torch.Tensor] = field(default_factory=dict)


def layout_of(source: Source) -> Layout:
    """The layout of a model.

    Raises:
        WeightsExportError: the architecture, a setting or a weight is not mapped; it is named.
    """
    config: Any = getattr(source.model, "config", None)
    kind = getattr(config, "model_type", type(source.model).__name__)
    head = type(source.model).__name__
    lay = _LAYOUTS.get(head)
    if lay is None:
        raise WeightsExportError(
            f"{head} ({kind}) has no layout for GGUF here; {', '.join(_LAYOUTS)} have: export "
            'format="huggingface" and convert that by llama.cpp'
        )
    for name, expected in _FIXED[head].items():
        found = getattr(config, name, expected[0])
        if found not in expected:
            raise WeightsExportError(
                f"{name} = {found!r} of {head} has no place in a GGUF file that llama.cpp would "
                f"run; {' or '.join(map(repr, expected))} has"
            )
    layout = lay(source, config)
    mapped = {laid.weight for laid in layout.tensors}
    persistent = source.table.persistent()
    tied = {n for group in source.table.tied if mapped & set(group) for n in group}
    if left := [name for name in persistent if name not in mapped | tied]:
        raise WeightsExportError(
            f"{left[0]} ({len(left)} in all) has no place in the GGUF layout of {head}: llama.cpp "
            "refuses files with tensors that it does not use"
        )
    for laid in layout.tensors:
        if laid.weight not in persistent:
            raise WeightsExportError(f"{source.where} lacks {laid.weight}, which {head} has")
        check_limits(laid.name, tuple(persistent[laid.weight].shape))
    return layout


def check_limits(name: str, shape: tuple[int, ...]) -> None:
    """That ggml can read a tensor.

    Raises:
        WeightsExportError: its name is too long, or it has too many dimensions.
    """
    if len(name.encode()) >= MAX_NAME_BYTES or len(shape) > MAX_DIMENSIONS:
        raise WeightsExportError(
            f"{name} of shape {list(shape)} is beyond ggml's limits: names of up to "
            f"{MAX_NAME_BYTES - 1} bytes, {MAX_DIMENSIONS} dimensions"
        )


def _output(source: Source, embedding: str, head: str) -> list[Laid]:
    """The output matrix; readers take the embedding where the file has none."""
    together = any({embedding, head} <= set(group) for group in source.table.tied)
    return [] if together else [Laid("output.weight", head)]


def _gpt2(source: Source, config: Any) -> Layout:
    found = [
        Laid("token_embd.weight", "transformer.wte.weight"),
        Laid("position_embd.weight", "transformer.wpe.weight"),
    ]
    parts = {
        "attn_norm": ("ln_1", AS_IT_IS), "attn_qkv": ("attn.c_attn", TRANSPOSED),
        "attn_output": ("attn.c_proj", TRANSPOSED), "ffn_norm": ("ln_2", AS_IT_IS),
        "ffn_up": ("mlp.c_fc", TRANSPOSED), "ffn_down": ("mlp.c_proj", TRANSPOSED),
    }  # fmt: skip
    for layer in range(config.n_layer):
        for name, (own, turn) in parts.items():
            for leaf in ("weight", "bias"):
                found.append(
                    Laid(
                        f"blk.{layer}.{name}.{leaf}",
                        f"transformer.h.{layer}.{own}.{leaf}",
                        turn if leaf == "weight" else AS_IT_IS,
                    )
                )
    found += [Laid(f"output_norm.{x}", f"transformer.ln_f.{x}") for x in ("weight", "bias")]
    found += _output(source, "transformer.wte.weight", "lm_head.weight")
    metadata = {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "block_count": config.n_layer,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }
    return Layout("gpt2", tuple(found), metadata)


# of a layer: its name in the file, and in the model
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Phi-3 has some of them in one matrix
_FUSED = {
    **{k: v for k, v in _LAYER.items() if k not in ("attn_q", "attn_k", "attn_v", "ffn_gate")},
    "attn_qkv": "self_attn.qkv_proj",
    "ffn_up": "mlp.gate_up_proj",
}
_NORMED = {**_LAYER, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


def _llama(source: Source, config: Any) -> Layout:
    turns = {
        "attn_q": rotary(config.num_attention_heads),
        "attn_k": rotary(config.num_key_value_heads),
    }
    return _decoder("llama", source, config, _LAYER, turns)


def _decoder(
    architecture: str,
    source: Source,
    config: Any,
    parts: Mapping[str, str],
    turns: Mapping[str, Turn],
) -> Layout:
    """Layers of attention and a gated network, as Llama has them.

    Args:
        turns: of the parts that are otherwise in the file; where llama.cpp itself rotates the
            halves of a head, as of all but Llama, there are none.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    names = source.table.persistent()
    found = [Laid("token_embd.weight", "model.embed_tokens.weight")]
    for layer in range(config.num_hidden_layers):
        for name, own in parts.items():
            weight, turn = f"model.layers.{layer}.{own}", turns.get(name, AS_IT_IS)
            found.append(Laid(f"blk.{layer}.{name}.weight", f"{weight}.weight", turn))
            # of queries and keys turned as their matrices are
            if f"{weight}.bias" in names:
                found.append(Laid(f"blk.{layer}.{name}.bias", f"{weight}.bias", turn))
    found.append(Laid("output_norm.weight", "model.norm.weight"))
    found += _output(source, "model.embed_tokens.weight", "lm_head.weight")
    rope = dict(config.rope_parameters)
    # a model of another kind that says so is refused
    share = rope.pop("partial_rotary_factor", 1.0) if architecture == "phi3" else 1.0
    rotated = int(head_dim * share)
    scaling, made = _scaling(config, rope, rotated)
    if made and architecture != "llama":
        raise WeightsExportError(
            f"rope_type 'llama3' of {type(source.model).__name__} has no place in a GGUF file "
            "that llama.cpp would run; of Llama it has"
        )
    metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": rotated,
        **scaling,
    }
    return Layout(architecture, tuple(found), metadata, made)


def _scaling(
    config: Any, rope: Mapping[str, Any], head_dim: int
) -> tuple[dict[str, int | float | str], dict[str, torch.Tensor]]:
    """Metadata and tensors of the rotary embedding."""
    kind = rope.get("rope_type", "default")
    before = "original_max_position_embeddings"
    known = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", before},
        "yarn": {"factor", before},
    }
    strange = sorted(set(rope) - {"rope_type", "type", "rope_theta"} - known.get(kind, set()))
    if kind not in known or strange:
        what = f"rope_type {kind!r}" if kind not in known else f"{strange[0]} of rope_type {kind!r}"
        raise WeightsExportError(
            f"{what} has no place in a GGUF file here; {', '.join(known)} have"
        )
    found: dict[str, int | float | str] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get(before) or config.max_position_embeddings
        found["rope.scaling.original_context_length"] = int(original)
    if kind != "llama3":
        return found, {}
    return found, {"rope_freqs.weight": _llama3_factors(rope, head_dim)}


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """What each frequency is divided by."""
    factor, low, high = (rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = rope["original_max_position_embeddings"]
    found = []
    for n in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (n / head_dim)
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found, dtype=torch.float32)


_LAYOUTS: dict[str, Callable[[Source, Any], Layout]] = {
    "GPT2LMHeadModel": _gpt2,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": lambda source, config: _decoder("qwen2", source, config, _LAYER, {}),
    "Qwen3ForCausalLM": lambda source, config: _decoder("qwen3", source, config, _NORMED, {}),
    "Phi3ForCausalLM": lambda source, config: _decoder("phi3", source, config, _FUSED, {}),
}
_LLAMA_FIXED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "sliding_window": (None,)}
_QWEN_FIXED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "use_sliding_window": (False,)}
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "GPT2LMHeadModel": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "LlamaForCausalLM": _LLAMA_FIXED,
    "MistralForCausalLM": _LLAMA_FIXED,
    "Qwen2ForCausalLM": _QWEN_FIXED,
    "Qwen3ForCausalLM": {**_QWEN_FIXED, "attention_bias": (False,)},
    "Phi3ForCausalLM": _LLAMA_FIXED,
}
