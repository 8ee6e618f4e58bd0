"""Eager recomputation with torch's own function, as its users write it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from experiments.peers.subject import Subject

Policy = Callable[..., CheckpointPolicy]


class NotApplicable(Exception):
    """A peer cannot be used on this model or on this machine; says why."""


def checkpointed(module: nn.Module, **options: Any) -> None:
    """Puts every call of a module under torch's function."""
    forward = module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        # a list that the model appends to afterwards would be longer in the replay
        kept = tuple(list(a) if isinstance(a, list) else a for a in args)
        return checkpoint(forward, *kept, use_reentrant=False, **options, **kwargs)

    module.forward = call


def per_block(subject: Subject, model: nn.Module) -> nn.Module:
    """`torch.utils.checkpoint` on every block."""
    for path in subject.blocks:
        checkpointed(model.get_submodule(path))
    return model


def hugging_face(_: Subject, model: nn.Module) -> nn.Module:
    """`gradient_checkpointing_enable`."""
    switch = getattr(model, "gradient_checkpointing_enable", None)
    if switch is None:
        raise NotApplicable("not a transformers model")
    if not model.supports_gradient_checkpointing:
        raise NotApplicable("transformers has no gradient checkpointing for this model")
    switch(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


class Segment(nn.Module):
    """Consecutive blocks as one block under torch's function; each gets the same arguments."""

    def __init__(self, blocks: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = checkpoint(self.run, x, *args, use_reentrant=False, **kwargs)
        return out

    def run(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, *args, **kwargs)
        return x


def segments(subject: Subject, model: nn.Module) -> nn.Module:
    """The model's chain of n blocks as about sqrt(n) segments of equal length.

    Unlike `checkpoint_sequential` it checkpoints the last segment too.
    """
    return _in_segments(subject, model)


def nested(subject: Subject, model: nn.Module) -> nn.Module:
    """The same segments, and in them every block under torch's function once more."""
    if subject.chain is not None:
        for block in subject.chain(model).blocks:
            checkpointed(block)
    return _in_segments(subject, model)


def _in_segments(subject: Subject, model: nn.Module) -> nn.Module:
    if subject.chain is None:
        raise NotApplicable("the blocks are not called in one chain")
    chain = subject.chain(model)
    count = round(math.sqrt(len(chain.blocks)))
    ends = [round(i * len(chain.blocks) / count) for i in range(count + 1)]
    parts = [Segment(chain.blocks[a:b]) for a, b in itertools.pairwise(ends)]
    setattr(model.get_submodule(chain.owner), chain.attribute, nn.ModuleList(parts))
    return model


# ---- selective checkpointing

ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm")


def _overloads(names: tuple[str, ...]) -> frozenset[Any]:
    packets = [getattr(torch.ops.aten, name) for name in names]
    return frozenset(packet.default for packet in packets)


def selectively(module: nn.Module, policy: Callable[[], Policy]) -> None:
    """Puts every call of a module under selective checkpointing, each with its own policy."""
    checkpointed(module, context_fn=lambda: create_selective_checkpoint_contexts(policy()))


def selective(policy: Callable[[], Policy]) -> Callable[[Subject, nn.Module], nn.Module]:
    """Selective checkpointing of every block."""

    def prepare(subject: Subject, model: nn.Module) -> nn.Module:
        for path in subject.blocks:
            selectively(model.get_submodule(path), policy)
        return model

    return prepare


def _all_products() -> Policy:
    saved = _overloads((*PRODUCTS, *ATTENTION))

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _every_second() -> Policy:
    """torchtitan's rule: attention is saved, and of the matrix products every second one."""
    products, attention = _overloads(PRODUCTS), _overloads(ATTENTION)
    counts: Counter[bool] = Counter()

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in products:
            counts[ctx.is_recompute] += 1
            saved = counts[ctx.is_recompute] % 2 == 1
        else:
            saved = op in attention
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


all_products = selective(_all_products)
every_second = selective(_every_second)
