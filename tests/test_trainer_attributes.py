"""What a trainer of the user's own keeps in its attributes: kept and put back, or said."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actckpt.resuming.attributes import attribute_digest
from actckpt.resuming.batch_digest import WHOLE_BYTES, batch_digest

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from actckpt.integrations.trainer_attributes import OwnAttributes  # noqa: E402
from actckpt.integrations.trainer_state import TrainingState  # noqa: E402
from tests.trained import make_trainer  # noqa: E402
from tests.trainer_runs import QUIET  # noqa: E402

pytestmark = QUIET


class Keeping:
    """In place of a trainer."""

    x: Any
    y: Any
    epoch: Any
    best_metric: Any

    def __init__(self, **attributes: Any) -> None:
        self.args = types.SimpleNamespace(device=torch.device("cpu"))
        self.model = torch.nn.Linear(1, 1)
        vars(self).update(attributes)


def own(trainer: Any) -> OwnAttributes:
    return OwnAttributes(trainer, ("args",))


def after(before: Any, later: Any) -> tuple[dict[str, Any], list[str]]:
    """What another process has in its attributes after a resume, and what it says."""
    trainer = Keeping(x=before)
    saved = own(trainer)
    trainer.x = later
    state = copy.deepcopy(saved.state_dict())
    again = Keeping(x=before)
    reasons = own(again).put(state)
    return vars(again), reasons


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Marks tensors as lying on a device that none of these machines has."""
    real = torch.Tensor.device

    def device(x: Any) -> torch.device:
        return torch.device("cuda:0") if hasattr(x, "marked") else real.__get__(x)

    def moved(values: list[float]) -> torch.Tensor:
        x: Any = torch.tensor(values)
        x.marked = True
        return x  # type: ignore[no-any-return]

    monkeypatch.setattr(torch.Tensor, "device", property(device))
    yield moved
    monkeypatch.undo()


def test_tensors_on_a_device_are_kept(accelerator: Any) -> None:
    found, reasons = after(None, [accelerator([1.0, 2.0])])
    assert [x.tolist() for x in found["x"]] == [[1.0, 2.0]]
    assert not reasons


def test_tensors_that_cannot_be_read_are_named() -> None:
    found, reasons = after(None, [torch.ones(2, device="meta")])
    assert found["x"] is None
    assert reasons == ["Keeping.x cannot be compared (batch[0]: on meta)"]


def test_large_tensors_are_compared_whole() -> None:
    x = torch.zeros(WHOLE_BYTES)
    before = attribute_digest(x), attribute_digest(x.numpy())
    x[12_345] = 1
    assert attribute_digest(x) != before[0]
    assert attribute_digest(x.numpy()) != before[1]


def test_a_loss_with_its_graph_is_kept() -> None:
    loss = torch.ones(2, requires_grad=True).sum()
    found, reasons = after(None, {"last": [loss, loss]})
    first, second = found["x"]["last"]
    assert first.item() == 2.0
    assert first is second
    assert not first.requires_grad
    assert not reasons
    _, reasons = after(None, {loss})  # which can be hashed, and not copied
    assert reasons == ["Keeping.x changes as it trains, and no checkpoint can hold it"]


class Linked:
    """It refers to others, which refer to it; counts how often it is looked at."""

    looks = 0

    def __init__(self) -> None:
        self.others: list[Linked] = []

    @property
    def tobytes(self) -> None:
        type(self).looks += 1
        assert type(self).looks < 5_000


def test_what_refers_to_itself_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linked, "looks", 0)
    linked = [Linked() for _ in range(5)]
    for x in linked:
        x.others = linked
    assert "contains itself" in batch_digest(linked[0]).omitted[0]
    knots: Any = Linked()
    for _ in range(12):  # no cycle, and thousands of ways
        above = Linked()
        above.others = [knots, knots]
        knots = above
    found = batch_digest(knots, most_objects=1_000)
    assert found.opaque == found.omitted
    assert "beyond 1,000 objects" in found.omitted[0]
    monkeypatch.setattr(Linked, "looks", 0)
    a, b = Linked(), {Linked()}
    vars(a)["others"] = b
    vars(next(iter(b)))["others"] = b
    assert "contains itself" in batch_digest(a).omitted[0]


class Broken:
    """Its own code fails."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


def test_an_attribute_whose_code_fails_is_named() -> None:
    _, reasons = after(None, Broken())
    assert reasons == ["Keeping.x cannot be compared (RuntimeError: tobytes)"]


class Reward:
    """It counts its calls."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self) -> int:
        return self.calls


def test_what_is_called_and_counts_is_named() -> None:
    assert after([Reward(0), len], [Reward(0), len])[1] == []
    _, reasons = after([Reward(0), len], [Reward(1), len])
    assert reasons == ["Keeping.x changes as it trains, and no checkpoint can hold it"]


def test_names_that_transformers_uses_elsewhere_are_kept() -> None:
    trainer = Keeping(epoch=0, best_metric=0.0)
    saved = own(trainer)
    trainer.epoch, trainer.best_metric = 3, 1.5
    assert saved.state_dict()["values"] == {"epoch": 3, "best_metric": 1.5}


def test_what_was_not_kept_is_compared() -> None:
    trainer = Keeping(x=0, y=1)
    state = own(trainer).state_dict()
    assert own(Keeping(x=0, y=1)).put(state) == []
    trainer.x = 5
    del trainer.y
    assert own(trainer).put(state) == [
        f"Keeping.{name} is another than it was, and was not kept" for name in "xy"
    ]


def test_what_is_put_twice_is_what_was_saved() -> None:
    trainer = Keeping(x=None)
    saved = own(trainer)
    trainer.x = [torch.zeros(2)]
    state = saved.state_dict()
    again = Keeping(x=None)
    loaded = own(again)
    for _ in range(2):
        assert loaded.put(state) == []
        (found,) = again.x
        assert found.tolist() == [0.0, 0.0]
        found += 1


def test_models_beside_that_change_are_named() -> None:
    def made() -> Any:
        teacher = torch.nn.Linear(100, 200).requires_grad_(False)
        teacher.weight.fill_(1)
        teacher.bias.fill_(1)
        return teacher

    trainer = Keeping(x=[made()], y=made())
    trainer.epoch = torch.nn.Sequential(trainer.model)  # not beside it
    saved = own(trainer)
    assert own(Keeping(x=[made()], y=made())).put(saved.state_dict()) == []
    trainer.x[0].weight.data.mul_(0.5)
    trainer.model.weight.data.mul_(0.5)
    assert own(Keeping(x=[made()], y=made())).put(saved.state_dict()) == [
        "Keeping.x's weights change as it trains, and are not kept: give the model to "
        "MemoryBudget, as extra={name: model}"
    ]
    assert own(Keeping(x=[made()])).put(own(Keeping(x=trainer.x)).state_dict()) == [
        "Keeping.x's weights are others than they were, and were not kept"
    ]


class Counting(transformers.Trainer):  # type: ignore[misc, name-defined]
    """With an attribute of its own."""

    counted = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counted = 1


def test_a_checkpoint_of_a_version_that_kept_none(tmp_path: Path) -> None:
    for kind in (transformers.Trainer, Counting):
        trainer = make_trainer(tmp_path, kind=kind, max_steps=1)
        trainer.train()
        state = TrainingState(trainer).state_dict()
        del state["own"]
        saved = TrainingState(trainer)
        saved.load_state_dict(state)
        reasons = saved.put(trainer.control)
        if kind is Counting:
            assert reasons == ["the version that saved kept no attributes of Counting (counted)"]
        else:
            assert reasons == []
