"""Processes that each train a whole copy of one model, as DistributedDataParallel has them do."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from actckpt import BudgetError, PlanError
from actckpt.budget import Left, budget_bytes
from actckpt.planning.announcing import announce
from actckpt.profiler.memory_size import memory_bytes
from actckpt.tracing.tracer import model_device
from actckpt.units import unit_of

# what DistributedDataParallel holds to exchange gradients in, for messages
BUCKETS = "DistributedDataParallel's buckets"


def no_replicas(found: str, works: str) -> PlanError:
    """What a training that cuts its model over processes or devices is refused with, in each.

    Args:
        found: "this training has 2 processes under FSDP".
        works: what to do instead.
    """
    return PlanError(
        "MemoryBudget trains where each process has one device and a whole copy of the model "
        f"(DistributedDataParallel); {found}. {works}; or leave MemoryBudget out"
    )


def wrapper_of(model: Any) -> DistributedDataParallel | None:
    """What exchanges the gradients of a model, as it is called; None where nothing does."""
    while not isinstance(model, DistributedDataParallel):
        model = getattr(model, "_orig_mod", None)
        if model is None:
            return None
    return model


def planned_in(model: nn.Module) -> nn.Module:
    """The module that a plan is made for: the one inside DistributedDataParallel."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def bucket_bytes(model: Any) -> dict[str, int]:
    """What the wrapper of a model holds beside it, by a name for messages; empty without one."""
    if not isinstance(model, DistributedDataParallel):
        return {}
    trained = (p for p in model.parameters() if p.requires_grad)
    return {BUCKETS: sum(p.numel() * p.element_size() for p in trained)}


def budget_left(asked: Any, model: nn.Module, others: dict[str, int]) -> Any:
    """The budget of a model, with what others take on its device taken off.

    Args:
        asked: as for `actckpt.optimize`.
        others: bytes, by a name for messages.

    Raises:
        BudgetError: the others alone take it.
    """
    if asked is None or not any(others.values()):
        return asked
    bound = budget_bytes(asked, lambda: memory_bytes(model_device(model)))
    unit = unit_of(asked)
    listed = ", ".join(f"{name} {unit.text(size)}" for name, size in others.items())
    left = bound - sum(others.values())
    if left <= 0:
        raise BudgetError(
            f"budget {unit.text(bound)} is below what lies beside the model that is "
            f"trained ({listed}): raise it, or move that to another device",
            budget_bytes=bound,
        )
    announce(f"of {unit.text(bound)} the model gets {unit.text(left)}: beside it lie {listed}")
    return Left(unit.exactly(left), bound - left)
