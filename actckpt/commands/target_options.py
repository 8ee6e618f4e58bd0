"""What `plan` and `compare` share: which model, which batch, which optimizer, which device."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from actckpt.targets import load_target

OPTIMIZERS: dict[str, type[torch.optim.Optimizer] | None] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "none": None,
}


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Add TARGET and the options that shape its step to ``parser``."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="module:function that returns (model, batch), or a Hugging Face model type: gpt2",
    )
    group = parser.add_argument_group("the training step")
    group.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="a field of the Hugging Face configuration, such as n_layer=6; repeatable",
    )
    group.add_argument("--batch-size", type=positive_int, default=4, metavar="N")
    group.add_argument("--seq-len", type=positive_int, default=512, metavar="N")
    group.add_argument("--dtype", help="of weights and images, such as bf16")
    group.add_argument(
        "--optimizer",
        choices=sorted(OPTIMIZERS),
        default="adamw",
        help="whose state and step count in the peak (default: %(default)s)",
    )
    group.add_argument(
        "--scope",
        choices=("step", "activations"),
        default="step",
        help="what the budget bounds: the peak of the whole step, or what the step adds to "
        "parameters, gradients, optimizer state and batch (default: %(default)s)",
    )
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--seed", type=int, default=0)


def load(args: argparse.Namespace) -> tuple[nn.Module, Any, torch.optim.Optimizer | None]:
    """The model, a batch and the optimizer that the options describe, on their device.

    Raises:
        TargetError: no such target, or settings that do not fit it.
    """
    model, batch = load_target(
        args.target,
        overrides=dict(args.overrides),
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        dtype=args.dtype,
        seed=args.seed,
    )
    model = model.to(args.device)
    batch = tree_map_only(torch.Tensor, lambda t: t.to(args.device), batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = OPTIMIZERS[args.optimizer]
    optimizer = kind(trained, lr=1e-4) if kind is not None and trained else None  # type: ignore[call-arg]
    return model, batch, optimizer


def describe(args: argparse.Namespace, model: nn.Module) -> str:
    """One line that says which step is planned."""
    size = sum(p.numel() for p in model.parameters())
    settings = ", ".join(f"{key}={value}" for key, value in args.overrides)
    shape = "" if ":" in args.target else f", batch {args.batch_size} × {args.seq_len}"
    return (
        f"{args.target}{f' ({settings})' if settings else ''}: "
        f"{size:,} parameters{shape}, optimizer {args.optimizer}, {args.device}"
    )


def positive_int(text: str) -> int:
    """``text`` as an integer of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return key, value
