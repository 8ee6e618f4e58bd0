"""GPT-2 of any depth as a subject."""

from __future__ import annotations

from experiments.peers.subject import Subject, listed, numbered
from tests.suite import tokens


def gpt2_of(layers: int, batch: int, heads: int, vocabulary: int) -> Subject:
    """GPT-2 of width 256 on 256 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=256,
        n_embd=256,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Subject(
        f"{layers} layers of width 256, {batch} x 256 tokens",
        GPT2LMHeadModel(config),
        tokens(batch, 256, vocabulary)(),
        numbered("transformer.h", layers),
        listed("transformer", "h"),
    )
