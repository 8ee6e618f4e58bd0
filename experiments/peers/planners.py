"""Planners of others. None is a dependency: they are used where they can be imported.

pip install --no-deps --target runs/peer_packages pulp pwlf ckptplan rockmate rkgb
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.peers.checkpointing import NotApplicable, checkpointed, selectively
from experiments.peers.meter import measured_held
from experiments.peers.sac_ilp import decided, policy_of, saved_by
from experiments.peers.subject import Subject
from tests.suite import call

PACKAGES = Path("runs/peer_packages")
Prepare = Callable[[Subject, nn.Module], nn.Module]


def wanted(name: str) -> Any:
    """The module, also from `PACKAGES`.

    Raises:
        NotApplicable: it cannot be imported; says why.
    """
    if PACKAGES.is_dir() and str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))  # last: torch and numpy stay those of this environment
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotApplicable(f"{name} does not import: {error}") from error


def sac_ilp(share: float) -> Prepare:
    """`torch.distributed._tools`: SAC estimator and integer program, over the model's blocks.

    Args:
        share: budget over the peak that its own tracker sees for the untouched model.
    """

    def prepare(subject: Subject, model: nn.Module) -> nn.Module:
        for name in ("pulp", "pwlf"):
            wanted(name)
        for path, discarded, stats in decided(subject, copy.deepcopy(model), share):
            saved = saved_by(stats, discarded)
            selectively(model.get_submodule(path), partial(policy_of, saved))
        return model

    return prepare


def ckptplan(share: float) -> Prepare:
    """ckptplan's dynamic program: which blocks of a chain to checkpoint.

    It measures bytes on CUDA alone; here they come from this package's meter.

    Args:
        share: budget over the bytes that all blocks save.
    """

    def prepare(subject: Subject, model: nn.Module) -> nn.Module:
        package = wanted("ckptplan")
        if subject.chain is None:
            raise NotApplicable("the blocks are not called in one chain")
        tried = copy.deepcopy(model)
        modules = [tried.get_submodule(path) for path in subject.blocks]
        calls = _arguments(subject, tried, modules)
        blocks = package.declare_blocks(tried, list(zip(subject.blocks, modules, strict=True)))
        profiles = []
        for i, (block, (args, kwargs)) in enumerate(zip(blocks, calls, strict=True)):
            # one by one: its own chain passes on what a block returns, and nothing else
            alone = dataclasses.replace(block, order=0)
            (profile,) = package.profile_blocks((alone,), args, kwargs, device="cpu", num_trials=3)
            held = measured_held(partial(block.module, *args, **kwargs))
            profiles.append(
                dataclasses.replace(
                    profile,
                    order=i,
                    timing_only=False,
                    activation_bytes_estimate=held,
                    activation_bytes_method="isolated_forward_delta",
                )
            )
        plan = package.plan_checkpoints(
            profiles,
            blocks,
            target_kind="activation_budget_bytes",
            target_value=share * sum(p.activation_bytes_estimate for p in profiles),
        )
        chosen = [d.block_id for d in plan.decisions if d.checkpointed]
        if not chosen:
            raise NotApplicable("it checkpoints no block")
        for path in chosen:
            checkpointed(model.get_submodule(path))
        return model

    return prepare


def _arguments(
    subject: Subject, model: nn.Module, modules: list[nn.Module]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each of the modules is called with in a step."""
    found: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[module] = _detached((args, kwargs))  # now: the model may append to a list

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    with torch.random.fork_rng(devices=[]):
        call(model, subject.batch)
    for hook in hooks:
        hook.remove()
    return [found[module] for module in modules]


def _detached(value: Any) -> Any:
    def detach(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.detach().requires_grad_(x.requires_grad)

    return torch.utils._pytree.tree_map(detach, value)


def rockmate(_: float) -> Prepare:
    """Rockmate, where it imports and can plan for this machine."""

    def prepare(subject: Subject, model: nn.Module) -> nn.Module:
        package = wanted("rockmate")
        raise NotApplicable(
            f"rockmate {getattr(package, '__version__', '')} imports, but 2.0 plans for CUDA "
            "devices only, and 1.0 needs a Gurobi licence"
        )

    return prepare
