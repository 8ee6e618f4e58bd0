"""What `plan` and `compare` share: which model, which batch, which optimizer, which device."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from actckpt.commands.targets import load_target
from actckpt.policies import SEARCHES
from actckpt.policies.solver.work import DEFAULT_EFFORT, MOST_EFFORT, checked_effort
from actckpt.profiler.devices import DEVICES, find_device, refuse_dtypes
from actckpt.tracing.weightless import without_weights

OPTIMIZERS: dict[str, type[torch.optim.Optimizer] | None] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "none": None,
}


def add_target_options(parser: argparse.ArgumentParser, *, scope: str = "step") -> None:
    """Add TARGET and the options that shape its step to ``parser``.

    Args:
        scope: what a budget bounds where the user does not say.
    """
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
    hugging_face = "of a Hugging Face model type"
    group.add_argument(
        "--batch-size", type=positive_int, default=4, metavar="N", help=f"samples, {hugging_face}"
    )
    group.add_argument(
        "--seq-len", type=positive_int, default=512, metavar="N", help=f"tokens, {hugging_face}"
    )
    group.add_argument(
        "--dtype", help="of weights and images, such as bf16 (default: the configuration's)"
    )
    group.add_argument(
        "--optimizer",
        choices=sorted(OPTIMIZERS),
        default="adamw",
        help="whose state and step count in the peak",
    )
    group.add_argument(
        "--scope",
        choices=("step", "activations"),
        default=scope,
        help="what the budget bounds: the peak of the whole step, or what the step adds to "
        "parameters, gradients, optimizer state and batch",
    )
    group.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="a device of this machine, or one to plan for that is not here: " + ", ".join(DEVICES),
    )
    group.add_argument("--seed", type=int, default=0, help="of weights and batch")


def load(args: argparse.Namespace) -> tuple[nn.Module, Any, torch.optim.Optimizer | None]:
    """The model, a batch and the optimizer that the options describe, on their device.

    For a device that is not here the model is built without weights.

    Raises:
        PlanError: the device lacks a dtype of the model.
        TargetError: no such target, or settings that do not fit it.
    """
    elsewhere = find_device(args.device)
    with without_weights() if elsewhere is not None else nullcontext():
        model, batch = load_target(
            args.target,
            overrides=dict(args.overrides),
            batch_size=args.batch_size,
            seq_len=args.seq_len,
            dtype=args.dtype,
            seed=args.seed,
        )
    if elsewhere is None:
        model = model.to(args.device)
        batch = tree_map_only(torch.Tensor, lambda t: t.to(args.device), batch)
    else:
        refuse_dtypes(elsewhere, {str(p.dtype)[6:]: n for n, p in model.named_parameters()})
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
        f"{size:,} parameters{shape}, optimizer {args.optimizer}, {_place(args)}"
    )


def _place(args: argparse.Namespace) -> str:
    found = find_device(args.device)
    return args.device if found is None else f"for {found.name}, without weights"


def device(text: str) -> str:
    """``text`` if it names a device, here or in the table, for argparse."""
    if find_device(text) is not None:
        return text
    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    here = {"cpu", *(["cuda"] if torch.cuda.is_available() else [])}
    if kind in here:
        return text
    raise argparse.ArgumentTypeError(
        f"no device {text!r}: here there is {' and '.join(sorted(here))}; to plan for one that is "
        f"not here, name it: {', '.join(DEVICES)}"
    )


def add_effort_option(parser: argparse.ArgumentParser) -> None:
    """``--effort``, of the policies that search."""
    parser.add_argument(
        "--effort",
        type=_effort,
        metavar="E",
        help=f"how long {', '.join(SEARCHES)} look for a faster plan once they have one: "
        f"0 (not at all) to {MOST_EFFORT:g}; left out: {DEFAULT_EFFORT:g}, some seconds",
    )


def _effort(text: str) -> float:
    try:
        return checked_effort(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number from 0 to {MOST_EFFORT:g}"
        ) from error


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
