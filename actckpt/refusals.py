"""What the public functions refuse of their arguments, before anything is touched."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from actckpt.errors import ArgumentError, PlanError
from actckpt.rewriting.sharing import refuse_shared
from actckpt.tracing.compiled import is_compiler_wrapper
from actckpt.tracing.lightning import is_lightning, refuse_manual
from actckpt.tracing.tracer import made_in_inference, model_device


def refuse_model(model: nn.Module) -> None:
    """Models that no plan can be made for.

    Raises:
        ArgumentError: it is no module.
        PlanError: it is one of those.
    """
    refuse_untraceable(model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise PlanError(
            f"{type(model).__name__} wraps the model that is to be planned: "
            "call actckpt.optimize on the inner module first, then wrap it"
        )
    if is_compiler_wrapper(model):
        raise PlanError(
            "this is what torch.compile has made of a model, and plans are for eager models: call "
            "actckpt.optimize on the model inside (model._orig_mod). It runs as planned, and "
            "nothing of it is compiled; or leave actckpt out and train it compiled"
        )
    refuse_shared(model)
    if is_lightning(model):
        refuse_manual(model)


def refuse_untraceable(model: nn.Module) -> None:
    """Models of which no step can be run or traced as it is.

    Raises:
        ArgumentError: it is no module.
        PlanError: it is on several devices, or on meta; has parameters without a shape yet; or is
            compiled TorchScript.
        TraceError: parameters were made in inference mode.
    """
    given: Any = model
    if not isinstance(given, nn.Module):
        found = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise ArgumentError(f"model must be a torch.nn.Module; found {found}")
    if isinstance(model, torch.jit.ScriptModule):
        raise PlanError(
            "this is a ScriptModule (torch.jit.script or torch.jit.trace): its forward is not "
            "Python any more, and no part of it can be recomputed. Call actckpt on the "
            "torch.nn.Module that it was made of, and train that"
        )
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(t):
            raise PlanError(
                f"{name} has no shape yet (a lazy module, such as LazyLinear, takes it from its "
                "first batch): run model(batch) once under torch.no_grad(), make the optimizer, "
                "and then call actckpt"
            )
        if isinstance(t, nn.Parameter) and t.is_inference():
            raise made_in_inference(name)
    model_device(model)


def refuse_inference_mode() -> None:
    """Where no step can be trained.

    Raises:
        PlanError: this is inside `torch.inference_mode`.
    """
    if torch.is_inference_mode_enabled():
        raise PlanError(
            "inside torch.inference_mode() no step can be trained, and so none be planned, traced "
            "or measured: call it outside. What is to run without gradients alone needs no plan: "
            "nothing is saved for backward there"
        )


def refuse_loss(loss_fn: object, has_target: bool, *, target: str = "target") -> None:
    """A ``loss_fn`` that cannot be called with what it will be given.

    Args:
        has_target: it is called with the output and a target; else with the output alone.
        target: the argument of the public function by which a target is given.

    Raises:
        ArgumentError: it is no function, or takes more or fewer arguments.
    """
    if loss_fn is None:
        if has_target:
            raise ArgumentError(
                f"{target}= is what a loss_fn(output, target) is given besides the output, and "
                f"there is no loss_fn: pass loss_fn=, or leave {target} out"
            )
        return
    if not callable(loss_fn) or isinstance(loss_fn, type):
        found = f"the class {loss_fn.__name__}" if isinstance(loss_fn, type) else repr(loss_fn)
        raise ArgumentError(
            "loss_fn must be a function of the model's output, loss_fn(output) or "
            f"loss_fn(output, target), such as torch.nn.MSELoss(); found {found:.80}"
        )
    called: Any = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):
        return  # one of C++, which does not say what it takes
    if _takes(signature, 1 + has_target):
        return
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    if not has_target and _takes(signature, 2):
        second = list(signature.parameters)[1]
        raise ArgumentError(
            f"loss_fn {name} takes two arguments, the output and {second!r}, and there is no "
            f"target: pass {target}=, or a loss_fn of the output alone"
        )
    if has_target and _takes(signature, 1):
        raise ArgumentError(
            f"loss_fn {name} takes the output alone, and {target}= was given as well: leave it "
            "out, or pass a loss_fn(output, target)"
        )
    raise ArgumentError(
        f"loss_fn {name}{signature} can be called neither as loss_fn(output) nor as "
        "loss_fn(output, target): pass a function that can"
    )


def refuse_loss_beside_training_step(model: nn.Module, loss_fn: object) -> None:
    """A LightningModule's ``training_step`` is what is planned for a batch.

    Raises:
        PlanError: there is a ``loss_fn`` besides.
    """
    if loss_fn is not None and is_lightning(model):
        raise PlanError(
            f"{type(model).__name__} is a LightningModule, and its training_step makes the loss: "
            "leave loss_fn and target out, and pass as batch what its loader gives. For a loop of "
            "your own that calls the module itself, optimize the module inside"
        )


def _takes(signature: inspect.Signature, positional: int) -> bool:
    try:
        signature.bind(*(None,) * positional)
    except TypeError:
        return False
    return True
