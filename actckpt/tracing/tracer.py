"""Runs one training step on fake tensors and returns it as a `Graph`."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from actckpt.data.graph import Category, Graph, Phase
from actckpt.errors import PlanError, TraceError
from actckpt.tracing.call import map_tensors, tensors
from actckpt.tracing.data_dependence import asks_for_numbers, user_line
from actckpt.tracing.fake import faked
from actckpt.tracing.fake_steps import FakeSteps
from actckpt.tracing.hidden import hidden_state
from actckpt.tracing.optimizing import held
from actckpt.tracing.parts import is_of_nested, ragged
from actckpt.tracing.recorder import Recorder
from actckpt.tracing.self_checkpointing import refuse_self_checkpointing
from actckpt.tracing.stages import StageRecorder
from actckpt.tracing.step import Step, run_step
from actckpt.tracing.transforms import hooks_off_in_transforms
from actckpt.versions import versions

DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

# begins what torch says of tensors that were made in inference mode
_INFERENCE = "Inference tensors"


def trace_step(model: nn.Module, step: Step) -> Graph:
    """The training step of ``model`` as a graph; the model is left exactly as it was.

    The output is assumed to stay referenced until the step ends, so the graph bounds the memory of
    loops that keep it. Cost: one run of the model's Python, no kernels, no memory.

    Raises:
        TraceError: the forward depends on values of activations, or there is nothing to train.
        Exception: whatever the model itself raises for this batch, with a note.
    """
    device = model_device(model) if step.stand_in is None else "cpu"
    with faked(model, step) as (world, fake_step):
        recorder = Recorder(world)
        _enter_residents(model, fake_step, recorder)
        stages = StageRecorder(model, recorder, fake_step.entry)
        steps = FakeSteps(fake_step.optimizers, device)
        try:
            with (
                refuse_self_checkpointing(),
                torch.enable_grad(),
                world.mode,
                recorder,
                hooks_off_in_transforms(recorder),
            ):
                loss_seen = _run(model, fake_step, steps, recorder)
        except Exception as error:
            if is_of_nested(error):
                raise ragged(f"one is made at {user_line(error)}") from error
            if _INFERENCE in str(error):
                raise made_in_inference(_inference_tensor(model, step, error)) from error
            if isinstance(error, DATA_DEPENDENT) or asks_for_numbers(error):
                raise stages.data_dependent(error) from error
            # a guard may have fired
            error.__dict__[OTHERWISE] = world.guards.otherwise()
            raise
        finally:
            stages.close()
        graph = _assemble(device, recorder, stages, fake_step, steps, loss_seen)
    return hidden_state(graph)


# of an error that ended a trace: answers that the forward was not given yet
OTHERWISE = "_actckpt_otherwise"


def model_device(model: nn.Module) -> str:
    """The one device that holds the model's parameters and buffers.

    Raises:
        PlanError: there are several, or it is meta; a parameter is a DTensor.
    """
    places: dict[str, str] = {}
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if type(t).__name__ == "DTensor":
            raise PlanError(f"{name} is a DTensor (FSDP or tensor parallel): not supported yet")
        places.setdefault(str(t.device), name)
    if not places:
        raise PlanError("the model has no parameters: there is nothing to train")
    if len(places) > 1:
        listed = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise PlanError(
            f"the model is on several devices ({listed}); a plan bounds the memory of one. "
            "Move it with model.to(device) first"
        )
    if "meta" in places:
        raise PlanError(
            f"{places['meta']} is on the meta device, without values to train: move the model to a "
            "device (model.to_empty(device=...), then load or initialize its weights), and call "
            "actckpt after that. A plan for a device that is not here needs no weights: "
            "actckpt plan TARGET --device h100"
        )
    return next(iter(places))


def made_in_inference(where: str) -> TraceError:
    """The error for a tensor made in inference mode; ``where`` one was met."""
    return TraceError(
        "a tensor that was made in torch.inference_mode() takes part in the training step: "
        f"{where}.\nAutograd cannot follow it.\n"
        "What works: make it under torch.no_grad(), or use tensor.clone(), made outside of "
        "inference mode"
    )


def _inference_tensor(model: nn.Module, step: Step, error: Exception) -> str:
    """Which tensor of a step was made in inference mode."""
    found = next((name for name, t in model.named_buffers() if t.is_inference()), "")
    if found:
        return found
    given = any(t.is_inference() for t in (*tensors(step.call), *tensors(step.target)))
    return "one of the batch" if given else f"at {user_line(error)}"


def _enter_residents(model: nn.Module, step: Step, recorder: Recorder) -> None:
    """Everything that exists before the step begins."""
    for name, p in model.named_parameters():
        recorder.enter(p, Category.PARAMETER, name, born=-1)
        p.grad = None
        if step.accumulate and p.requires_grad:
            with recorder.world.mode:
                p.grad = torch.empty_like(p)
            recorder.enter(p.grad, Category.GRADIENT, name, born=-1)
    for name, b in model.named_buffers():
        recorder.enter(b, Category.BUFFER, name, born=-1)
    for t in (*tensors(step.call), *tensors(step.target)):
        recorder.enter(t, Category.BATCH, born=-1)
    for t in recorder.world.attached:
        recorder.enter(t, Category.CONSTANT, born=-1)


def _run(model: nn.Module, step: Step, steps: FakeSteps, recorder: Recorder) -> bool:
    def enter(phase: Phase) -> None:
        recorder.phase = phase

    with ExitStack() as hooks:  # a fake parameter would keep the recorder, and that every real one
        for name, p in model.named_parameters():
            if p.requires_grad:
                settle = p.register_post_accumulate_grad_hook(
                    lambda p, name=name: recorder.settle(p.grad, name)
                )
                hooks.callback(settle.remove)
        finish = hooks.enter_context(
            steps.in_backward(lambda n: _step_in_backward(model, steps, n, recorder))
        )
        seen = run_step(model, step, enter)
        finish()
    after = steps.after_backward()
    for number in after:
        _create_state(model, steps, number, recorder)
    recorder.phase = Phase.OPTIMIZER
    for number in after:
        steps.steady(number)
    return seen


def _create_state(model: nn.Module, steps: FakeSteps, number: int, recorder: Recorder) -> None:
    """The first step creates the state, which a steady step finds resident: it is not recorded."""
    recorder.recording = False
    steps.begin(number)
    recorder.recording = True
    optimizer = steps.optimizers[number].optimizer
    state = getattr(optimizer, "state", {})
    for key, found in state.items():
        # torch makes step counters real ones: fakes, as those of an optimizer that has stepped
        state[key] = map_tensors(found, recorder.world.fake)
    for t in held(optimizer, model.modules()):
        recorder.enter(recorder.world.fake(t), Category.OPTIMIZER, born=-1)


def _step_in_backward(model: nn.Module, steps: FakeSteps, number: int, recorder: Recorder) -> None:
    _create_state(model, steps, number, recorder)
    before, recorder.phase = recorder.phase, Phase.OPTIMIZER
    steps.steady(number)
    recorder.phase = before


def _assemble(
    device: str,
    recorder: Recorder,
    stages: StageRecorder,
    step: Step,
    steps: FakeSteps,
    loss_seen: bool,
) -> Graph:
    storages, saves = recorder.finish()
    # storages elsewhere (an optimizer's step counters on the CPU) cost nothing on this device
    elsewhere = {v.storage for v in recorder.values if v.device != device}
    storages = tuple(
        dataclasses.replace(s, bytes=0) if i in elsewhere else s for i, s in enumerate(storages)
    )
    if step.accumulate:
        written = {w for op in recorder.ops if op.phase is Phase.BACKWARD for w in op.writes}
        storages = tuple(
            dataclasses.replace(s, bytes=0)
            if s.category is Category.GRADIENT and s.born < 0 and i not in written
            else s
            for i, s in enumerate(storages)
        )
    return Graph(
        device=device,
        storages=storages,
        values=tuple(recorder.values),
        ops=tuple(recorder.ops),
        saves=saves,
        stages=stages.finish(),
        signatures=tuple(recorder.signatures),
        loss_seen=loss_seen,
        optimizer_seen=any(
            n not in steps.untraced or one.temporary_bytes is not None
            for n, one in enumerate(step.optimizers)
        ),
        untraced_optimizers=tuple(sorted(steps.untraced.items())),
        resident_gradients=step.accumulate,
        versions=versions(),
        shaped_by_values=recorder.shaped_by_values,
        supposed=tuple(dict.fromkeys(recorder.world.guards.lines)),
        calls=tuple(stages.followed.calls) if stages.followed is not None else (),
        stands_for=step.stand_in.name if step.stand_in is not None else "",
        in_backward=tuple(stages.in_backward),
    )
