"""Saved in the middle of a step: said to be, where it is; between two steps nothing is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers
from torch.utils.data import DataLoader, TensorDataset

import actckpt
from actckpt.resuming.under_way import _WATCHING


class Breakable(torch.optim.SGD):
    """Ctrl-C comes after the first of two parameters."""

    broken = False

    def step(self, closure: Any = None) -> Any:
        if self.broken:
            first = self.param_groups[0]["params"][0]
            first.data.add_(first.grad, alpha=-0.1)
            raise KeyboardInterrupt
        return super().step(closure)


class ByHand:
    """An optimizer that is none of torch's."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters)}]

    def step(self) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.1)

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def objects(seed: int = 0, optimizer: Any = Breakable) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    how = [0.1] if optimizer is Breakable else []
    data = TensorDataset(torch.linspace(-1, 2, 96).view(32, 3))
    return {
        "model": model,
        "optimizer": optimizer(model.parameters(), *how),
        "loader": DataLoader(data, batch_size=4, shuffle=True),
    }


def train(
    run: actckpt.Checkpointer,
    made: dict[str, Any],
    until: int,
    at: Callable[[int, str], None] = lambda step, where: None,
    parts: int = 1,
) -> None:
    """Steps of some batches each; ``at`` is called at every place in each."""
    made["optimizer"].zero_grad()
    for n, (step, (batch,)) in enumerate(run.steps(total_steps=until)):
        at(n, "handed out")
        made["model"](batch).square().mean().backward()
        at(n, "backward")
        if n % parts == parts - 1:
            at(n, "optimizer")
            made["optimizer"].step()
            at(n, "stepped")
            made["optimizer"].zero_grad()
            run.step()
        at(n, "counted")
        assert run.step_count >= step


def resumed(directory: Path, made: dict[str, Any]) -> actckpt.Checkpointer:
    run = actckpt.Checkpointer(directory, **made, every=None)
    return run


@pytest.mark.kind("save() after Ctrl-C in a step", resumed="said no")
@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("handed out", "while a KeyboardInterrupt was handled, with a batch in hand"),
        ("backward", "while a KeyboardInterrupt was handled, with a batch in hand"),
        ("optimizer", r"while Breakable\.step\(\) was under way"),
        ("stepped", r"after Breakable had stepped and before run\.step\(\) counted it"),
        ("counted", ""),
    ],
)
@pytest.mark.parametrize("handled", [True, False], ids=["in except", "after it"])
def test_interrupted_in_a_step(
    where: str, reason: str, handled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = objects()

    def interrupt(n: int, place: str) -> None:
        if (n, place) == (3, where):
            if where != "optimizer":
                raise KeyboardInterrupt
            made["optimizer"].broken = True

    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        try:
            train(run, made, 6, interrupt)
        except KeyboardInterrupt:
            if handled:
                run.save()
        if not handled:
            run.save()
            reason = reason.replace("while a KeyboardInterrupt was handled, ", "")
        # the process goes on: what was counted is whole again
        made["optimizer"].broken = False
    assert ("not to be resumed bit for bit" in caplog.text) == bool(reason)
    again = objects(1)
    with actckpt.Checkpointer(tmp_path, **again, every=None) as run:
        found = run.resume()
        assert found is not None
        assert found.bit_exact == (not reason)
        if not reason:
            assert found.step == 4
            train(run, again, 6)
            whole = objects()
            with actckpt.Checkpointer(tmp_path / "whole", **whole, every=None) as other:
                train(other, whole, 6)
            assert torch.equal(again["model"].weight, whole["model"].weight)
            return
        # what is saved of the steps after that is whole
        train(run, again, 6)
        run.save()
    with actckpt.Checkpointer(tmp_path, **objects(2), every=None) as run:
        last = run.resume()
    assert last is not None
    assert last.bit_exact
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.inexact)


@pytest.mark.kind("save() where the batch in hand is not trained on", resumed="said no")
@pytest.mark.parametrize(
    ("n", "where", "parts", "reason"),
    [
        (5, "handed out", 1, "before run.step() counted the step on it"),
        (5, "backward", 1, "before run.step() counted the step on it"),
        (5, "stepped", 1, "before run.step() counted it"),
        (5, "counted", 1, ""),
        (4, "handed out", 2, "that no gradient was made of"),
        (4, "backward", 2, ""),
        (4, "counted", 2, ""),
        (5, "handed out", 2, "before run.step() counted the step on it"),
        (5, "backward", 2, "before run.step() counted the step on it"),
        (0, "backward", 2, "before the first step showed how many make one"),
    ],
)
def test_saved_at_any_place_of_the_loop(
    n: int, where: str, parts: int, reason: str, tmp_path: Path
) -> None:
    made = objects()

    def save(count: int, place: str) -> None:
        if (count, place) == (n, where):
            run.save()

    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        train(run, made, 8 // parts, save, parts)
        assert len(run.list()) == 1
    again = objects(1)
    with actckpt.Checkpointer(tmp_path, **again, every=None) as run:
        found = run.resume()
        assert found is not None
        if reason:
            (said,) = found.inexact
            assert reason in said
            return
        assert found.bit_exact, found
        # the loop goes on where it was in its step
        for k, (_, (batch,)) in enumerate(run.steps(total_steps=8 // parts), n + 1):
            again["model"](batch).square().mean().backward()
            if k % parts == parts - 1:
                again["optimizer"].step()
                again["optimizer"].zero_grad()
                run.step()
    assert torch.equal(again["model"].weight, made["model"].weight)


def test_an_optimizer_that_is_none_of_torchs(tmp_path: Path) -> None:
    made = objects(optimizer=ByHand)
    # what is done before the first step is no step
    made["model"].load_state_dict(made["model"].state_dict())
    with actckpt.Checkpointer(tmp_path, **made, every=None, keep_last=None) as run:
        run.resume()
        run.save()
        train(run, made, 2)
        run.save()
        made["model"](torch.ones(1, 3)).sum().backward()
        made["optimizer"].step()
        run.save(tag="amid")
    found = {}
    with actckpt.Checkpointer(tmp_path, **objects(1, optimizer=ByHand), every=None) as run:
        for checkpoint in run.list():
            found[checkpoint.step, checkpoint.tag] = run.restore(checkpoint.step).inexact
    assert found[0, ""] == ()
    (reason,) = found[2, "amid"]
    assert reason.startswith("saved after parameters were changed")


@pytest.mark.kind("an optimizer that was not passed", resumed="said no")
def test_an_optimizer_that_was_not_passed_is_named(tmp_path: Path) -> None:
    made = objects()
    other = torch.optim.AdamW(made["model"].parameters())
    unrelated = torch.optim.RMSprop(nn.Linear(1, 1).parameters())
    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        run.resume()
        made["model"](torch.ones(1, 3)).sum().backward()
        made["optimizer"].step()
        other.step()
        unrelated.step()
        run.step()
        run.save()
    with actckpt.Checkpointer(tmp_path, **objects(1), every=None) as run:
        found = run.resume()
    assert found is not None
    assert [r for r in found.inexact if "not passed" in r] == [
        "AdamW steps on these parameters and was not passed: its state is in no checkpoint"
    ]


def test_one_within_a_wrapper_is_known(tmp_path: Path) -> None:
    class Wrapper:
        def __init__(self, parameters: Any) -> None:
            self.inner = {"adam": torch.optim.AdamW(parameters)}

        def step(self) -> None:
            self.inner["adam"].step()

        def zero_grad(self) -> None:
            self.inner["adam"].zero_grad()

        def state_dict(self) -> dict[str, Any]:
            return self.inner["adam"].state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.inner["adam"].load_state_dict(state)

    made = objects(optimizer=Wrapper)
    with actckpt.Checkpointer(tmp_path, **made, every=None) as run:
        train(run, made, 2)
        run.save()
        made["model"](torch.ones(1, 3)).sum().backward()
        made["optimizer"].step()
        run.save(tag="amid")
    again = objects(1, optimizer=Wrapper)
    with actckpt.Checkpointer(tmp_path, **again, every=None) as run:
        found = run.resume()
        assert found is not None
        assert found.inexact == ("saved after AdamW had stepped and before run.step() counted it",)


@pytest.mark.kind("a schedule that moves after run.step()", resumed="said no")
@pytest.mark.parametrize("late", [True, False])
def test_run_step_comes_last(late: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def made(seed: int) -> dict[str, Any]:
        found = objects(seed)
        optimizer = found["optimizer"]
        return {**found, "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    first = made(0)
    with actckpt.Checkpointer(tmp_path, **first, every=2) as run:
        for _, (batch,) in run.steps(total_steps=4):
            first["model"](batch).square().mean().backward()
            first["optimizer"].step()
            first["optimizer"].zero_grad()
            if late:
                run.step()
            first["scheduler"].step()
            if not late:
                run.step()
    assert ("call run.step() last" in caplog.text) == late
    with actckpt.Checkpointer(tmp_path, **made(1), every=None) as run:
        found = run.resume()
    assert found is not None
    assert found.bit_exact == (not late)


def test_a_schedule_of_epochs_may_move_between_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = objects()
    scheduler = torch.optim.lr_scheduler.StepLR(made["optimizer"], 1, 0.5)
    with actckpt.Checkpointer(tmp_path, **made, scheduler=scheduler, every=4) as run:
        for epoch in range(2):
            for _, (batch,) in run.steps(epochs=epoch + 1):
                made["model"](batch).square().mean().backward()
                made["optimizer"].step()
                made["optimizer"].zero_grad()
                run.step()
            scheduler.step()
    assert caplog.text == ""


@pytest.fixture
def _hooks() -> Iterator[None]:
    before = dict(optimizers._global_optimizer_pre_hooks)
    yield
    assert dict(optimizers._global_optimizer_pre_hooks) == before


@pytest.mark.usefixtures("_hooks")
def test_nobody_looks_once_the_run_has_ended(tmp_path: Path) -> None:
    left = len(_WATCHING)
    made = objects()
    with actckpt.Checkpointer(tmp_path / "a", **made, every=None) as run:
        train(run, made, 1)
        assert len(_WATCHING) == left + 1
    assert len(_WATCHING) == left
    dropped = actckpt.Checkpointer(tmp_path / "b", **made, every=None)
    train(dropped, made, 1)
    del dropped
    made["optimizer"].step()
