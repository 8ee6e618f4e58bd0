"""The public object on runs of a few kilobytes: saving, keeping, finding, refusing."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.checkpoint.names import PINNED
from actckpt.checkpoint.retention import Keep
from tests.test_checkpoint_encoding import same

ROOT = Path(__file__).parent.parent


class Small(nn.Module):
    """Two layers and a buffer."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.norm(self.first(x)).square().mean()
        return loss


def objects(width: int = 3, seed: int = 0) -> dict[str, Any]:
    """Arguments of a Checkpointer."""
    torch.manual_seed(seed)
    model = Small(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return {"model": model, "optimizer": optimizer}


def advance(run: actckpt.Checkpointer, made: dict[str, Any], steps: int, **metrics: Any) -> None:
    """Some optimizer steps."""
    for _ in range(steps):
        made["optimizer"].zero_grad()
        made["model"](torch.randn(5, 2)).backward()
        made["optimizer"].step()
        run.step(metrics)


def state(made: dict[str, Any]) -> dict[str, Any]:
    """A copy of the objects' states."""
    return {name: copy.deepcopy(item.state_dict()) for name, item in made.items()}


def names(run: actckpt.Checkpointer) -> list[str]:
    """Of the checkpoints, newest first."""
    return [c.path.name for c in run.list()]


# saving


def test_an_empty_directory_resumes_nothing(tmp_path: Path) -> None:
    made = objects()
    before = state(made)
    with actckpt.Checkpointer(tmp_path / "new" / "run", **made) as run:
        assert run.resume() is None
        assert run.list() == []
    assert same(state(made), before)


def test_cadence_and_retention(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(
        tmp_path, **made, every=2, keep_last=2, keep_every=6, keep_best=("loss", "min", 1)
    ) as run:
        for loss in (5, 1, math.nan, 4, 3, 3, 2, 9, math.inf, 8):
            advance(run, made, 1, loss=loss)
        assert names(run) == [f"step-{n:08d}" for n in (10, 8, 6, 2)]
        best = run.best()
        assert best is not None
        assert (best.step, best.metrics) == (2, {"loss": 1.0})
        assert run.best("loss", "max").step == 8  # type: ignore[union-attr]
        assert run.best("unheard of") is None


def test_what_is_pinned_stays(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1, keep_last=1) as run:
        advance(run, made, 1)
        run.pin(1)
        advance(run, made, 2)
        assert names(run) == ["step-00000003", "step-00000001"]
        assert [c.pinned for c in run.list()] == [False, True]
        run.pin(1, False)
        advance(run, made, 1)
        assert names(run) == ["step-00000004"]
        with pytest.raises(actckpt.CheckpointError, match="step 1; there are: 4"):
            run.pin(1)
    assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000004"]


def test_a_state_is_saved_once(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 1)
        assert run.save().path.name == "step-00000001"
        assert run.save(tag="final").path.name == "step-00000001.1"
        assert [c.tag for c in run.list()] == ["final", ""]


def test_a_run_taken_back_goes_on_from_there(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 3)
        assert run.restore(1).step == 1
        assert run.step_count == 1
        advance(run, made, 1)
        expected = state(made)
    made = objects(seed=1)
    with actckpt.Checkpointer(tmp_path, **made) as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.checkpoint.path.name == "step-00000002.1"
        assert same(state(made), expected)


def test_only_some_items(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made) as run:
        advance(run, made, 2)
        run.save()
    model = objects(seed=1)["model"]
    with actckpt.Checkpointer(tmp_path, model=model) as run:
        with pytest.raises(actckpt.CheckpointMismatchError, match="holds optimizer"):
            run.resume()
        run.restore(only=["model"])
        assert run.step_count == 0
    assert same(model.state_dict(), made["model"].state_dict())


def test_gradients_in_the_middle_of_accumulation(tmp_path: Path) -> None:
    made, again = objects(), objects(seed=1)
    loader = [torch.randn(5, 2) for _ in range(4)]
    found = []
    for each in (made, again):
        with actckpt.Checkpointer(tmp_path, **each, loader=loader) as run:
            run.resume()
            for step, batch in run.steps():
                each["model"](batch).backward()
                if step == 0 and run.list() == []:
                    run.save()
                if run._progress.position.batch % 2 == 0:
                    each["optimizer"].step()
                    each["optimizer"].zero_grad()
                    run.step()
            assert run.step_count == 2
        found.append(state(each))
    assert same(found[0], found[1])


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3, 3]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2),
                torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
            ],
            [2],
        ),
    ],
    ids=["multistep", "onecycle", "restarts", "plateau", "lambda", "cyclic", "sequential"],
)
def test_every_scheduler(schedule: Any, tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        made = objects(seed=seed)
        made["scheduler"] = schedule(made["optimizer"])
        with actckpt.Checkpointer(tmp_path, **made) as run:
            run.resume()
            for _ in range(4 if seed else 2):
                _scheduled_step(run, made)
            if not seed:
                run.save()
                for _ in range(4):
                    _scheduled_step(run, made)
        found.append((state(made), made["optimizer"].param_groups[0]["lr"]))
    assert same(found[0], found[1])


def _scheduled_step(run: actckpt.Checkpointer, made: dict[str, Any]) -> None:
    advance(run, made, 1)
    plateau = isinstance(made["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau)
    made["scheduler"].step(*([1.0] if plateau else []))


@pytest.mark.parametrize(
    "optimize",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), amsgrad=True),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.RMSprop(p, centered=True),
        lambda p: torch.optim.LBFGS(p),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.Rprop(p),
    ],
    ids=["sgd", "momentum", "adam", "adafactor", "rmsprop", "lbfgs", "nadam", "rprop"],
)
def test_every_optimizer(optimize: Any, tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Small()
        made = {"model": model, "optimizer": optimize(model.parameters())}
        with actckpt.Checkpointer(tmp_path, **made) as run:
            run.resume()
            for count in range(2 if seed else 4):
                x = torch.randn(5, 2)

                def closure(x: torch.Tensor = x, made: Any = made) -> torch.Tensor:
                    made["optimizer"].zero_grad()
                    loss: torch.Tensor = made["model"](x)
                    loss.backward()
                    return loss

                made["optimizer"].step(closure)
                run.step()
                if not seed and count == 1:
                    run.save()
        found.append(state(made))
    assert same(found[0], found[1])


def test_moments_of_another_dtype_than_the_parameter_are_not_rounded(tmp_path: Path) -> None:
    model = nn.Linear(3, 3, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.randn(p.shape),
            "exp_avg_sq": torch.rand(p.shape),
        }
    with actckpt.Checkpointer(tmp_path, model=model, optimizer=optimizer) as run:
        run.save()
        again = torch.optim.AdamW(model.parameters())
    with actckpt.Checkpointer(tmp_path, model=model, optimizer=again) as run:
        run.resume()
    assert same(again.state_dict(), optimizer.state_dict())


# failing


def test_a_state_that_cannot_be_saved_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    class Odd:
        def __init__(self) -> None:
            self.value: Any = 1

        def state_dict(self) -> dict[str, Any]:
            return {"inner": [self.value]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["inner"][0]

    made, odd = objects(), Odd()
    with actckpt.Checkpointer(tmp_path, **made, extra={"odd": odd}) as run:
        run.save()
        odd.value = object()
        advance(run, made, 1)
        with pytest.raises(actckpt.CheckpointSaveError, match=r"extra-odd\['inner'\]\[0\]"):
            run.save()
        assert names(run) == ["step-00000000"]
        assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000000"]


@pytest.mark.parametrize("failing", ["scheduler", "extra"])
def test_an_object_that_fails_to_load_leaves_all_as_they_were(failing: str, tmp_path: Path) -> None:
    class Failing:
        value = 0
        fails = False

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]
            if self.fails and self.value == 1:
                raise RuntimeError("cannot")

    bad = Failing()
    more: dict[str, Any] = {"extra": {"x": bad}} if failing == "extra" else {"scheduler": bad}
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, **more, every=None) as run:
        advance(run, made, 1)
        bad.value = 1
        run.save()
        advance(run, made, 2)
        bad.value, bad.fails = 2, True
        before, random = state(made), torch.get_rng_state()
        with pytest.raises(RuntimeError, match="cannot"):
            run.restore()
        assert same(state(made), before)
        assert bad.value == 2
        assert torch.equal(torch.get_rng_state(), random)
        assert run.step_count == 3


def other_model(made: dict[str, Any]) -> dict[str, Any]:
    return objects(width=4)


def other_optimizer(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "optimizer": torch.optim.SGD(made["model"].parameters(), lr=1)}


def other_order(made: dict[str, Any]) -> dict[str, Any]:
    parameters = [*made["model"].parameters()][::-1]
    return {**made, "optimizer": torch.optim.AdamW(parameters)}


def other_groups(made: dict[str, Any]) -> dict[str, Any]:
    groups = [{"params": [p]} for p in made["model"].parameters()]
    return {**made, "optimizer": torch.optim.AdamW(groups)}


def more_objects(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "scheduler": torch.optim.lr_scheduler.StepLR(made["optimizer"], 1)}


def more_data(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "loader": [torch.ones(1)] * 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_model, r"first\.weight is float32 \[4, 2\], saved was float32 \[3, 2\].*and 3 more"),
        (other_optimizer, "the optimizer of a AdamW, this is a SGD"),
        (other_order, r"parameter 0 .* is norm\.bias, saved was first\.weight"),
        (other_groups, r"groups of \[1, 1, 1, 1\] parameters, saved were groups of \[4\]"),
        (more_objects, "saved without scheduler"),
        (more_data, "loader of 2 batches an epoch, this one has 3"),
    ],
)
def test_checkpoints_of_other_objects_are_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, loader=[torch.ones(1)] * 2) as run:
        advance(run, made, 1)
        run.save()
    given = {"loader": [torch.ones(1)] * 2, **change(objects(seed=1))}
    live = {k: v for k, v in given.items() if k != "loader"}
    before = state(live)
    with actckpt.Checkpointer(tmp_path, **given) as run:
        with pytest.raises(actckpt.CheckpointMismatchError, match=message):
            run.resume()
        assert run.step_count == 0
    assert same(state(live), before)


def test_resume_skips_what_is_damaged_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 1)
        expected = state(made)
        advance(run, made, 2)
    weights = tmp_path / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    made = objects(seed=1)
    with actckpt.Checkpointer(tmp_path, **made) as run:
        resumed = run.resume()
        assert resumed is not None
        assert resumed.step == 1
        assert sorted(s.name for s in resumed.skipped) == ["step-00000002", "step-00000003"]
        assert "model.safetensors is truncated" in str(resumed)
        assert same(state(made), expected)
        advance(run, made, 2)
        assert run.save().path.name == "step-00000003.1"
    assert "model.safetensors is truncated" in caplog.text


def test_resume_raises_where_none_verifies(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, every=1) as run:
        advance(run, made, 2)
    for path in tmp_path.glob("*/state.json"):
        path.write_text("{}")
    before = state(made)
    run = actckpt.Checkpointer(tmp_path, **made)
    with pytest.raises(actckpt.CheckpointError, match=r"2 checkpoints and none can be used"):
        run.resume()
    run.close()
    assert same(state(made), before)
    assert len([*tmp_path.glob("step-*")]) == 2


def test_one_writer(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made) as run:
        run.save()
        other = actckpt.Checkpointer(tmp_path, **objects())
        with pytest.raises(actckpt.CheckpointError, match="another Checkpointer"):
            other.save()
        assert other.restore().step == 0  # reading is free
        code = (
            "import torch, actckpt\n"
            f"run = actckpt.Checkpointer({str(tmp_path)!r}, model=torch.nn.Linear(1, 1))\n"
            "try:\n    run.resume()\nexcept actckpt.CheckpointError as e:\n    print(e)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "another Checkpointer" in done.stdout
    other.save()
    other.close()


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    run = actckpt.Checkpointer(tmp_path, **objects())
    run.save()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # waits until the parent has closed; holds whatever it has inherited
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    run.close()
    with actckpt.Checkpointer(tmp_path, **objects()) as other:
        other.save(tag="while the child lives")
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0


def test_leftovers_of_killed_saves_are_removed_by_the_next_writer(tmp_path: Path) -> None:
    made = objects()
    for name in (".saving-step-00000001-1-ab", ".deleting-step-00000001-1-ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
    (tmp_path / f"{PINNED}step-00000001").touch()
    (tmp_path / ".my-own").mkdir()
    run = actckpt.Checkpointer(tmp_path, **made)
    assert run.list() == []
    assert len(os.listdir(tmp_path)) == 4
    run.save()
    run.close()
    assert sorted(os.listdir(tmp_path)) == [".lock", ".my-own", "step-00000000"]


def test_a_directory_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(actckpt.CheckpointSaveError, match="cannot be written"):
        actckpt.Checkpointer(tmp_path / "file" / "run", **objects()).save()
    run = actckpt.Checkpointer(tmp_path / "file", **objects())
    with pytest.raises(actckpt.CheckpointError, match="file"):
        run.list()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be"),
        ({"every": "10 parsecs"}, "every must be"),
        ({"verify": "no"}, "verify must be one of full, manifest"),
        ({"keep_last": 0}, "keep_last must be"),
        ({"keep_best": ("loss", "best", 1)}, "keep_best must be"),
        ({"keep_every": -1}, "keep_every must be"),
        ({"scheduler": 3}, "scheduler must have state_dict"),
        ({"extra": {"a/b": nn.Linear(1, 1)}}, "cannot be the name of a file"),
        ({"model": 3}, "model must be"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        actckpt.Checkpointer(tmp_path, **{**objects(), **arguments})
    assert os.listdir(tmp_path) == []


def test_the_loss_itself_is_a_metric(tmp_path: Path) -> None:
    with actckpt.Checkpointer(tmp_path, **objects()) as run:
        run.step(metrics={"loss": torch.tensor(1.5, requires_grad=True) * 2})
        assert run.save().metrics == {"loss": 3.0}


def test_metrics_are_numbers(tmp_path: Path) -> None:
    run = actckpt.Checkpointer(tmp_path, **objects())
    with pytest.raises(TypeError, match="metric loss must be a number"):
        run.step(metrics={"loss": torch.ones(2)})


def test_keep_never_lets_the_newest_go() -> None:
    assert Keep(last=1)([]) == []


def test_other_versions_and_configs_are_reported(tmp_path: Path) -> None:
    made = objects()
    with actckpt.Checkpointer(tmp_path, **made, config={"lr": 1, "seed": 2}) as run:
        run.save()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with actckpt.Checkpointer(tmp_path, **made, config={"lr": 3, "seed": 2}) as run:
            resumed = run.resume()
    finally:
        torch.set_num_threads(threads)
    assert resumed is not None
    assert not resumed.bit_exact
    assert resumed.inexact == (f"threads was {threads}, is {threads + 1}",)
    assert resumed.notes == ("config lr was 1, is 3",)
