"""A run that begins with somebody's weights, and one that goes on and does not look at them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actckpt import (
    ArgumentError,
    Checkpointer,
    CheckpointError,
    CheckpointMismatchError,
    LoadedWeights,
    load_weights,
)


def make(folder: Path, **options: Any) -> tuple[nn.Module, Checkpointer]:
    """A run, and its model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    rows: Any = torch.rand(8, 3)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
    run = Checkpointer(
        folder, model=model, optimizer=optimizer, loader=loader, every=None, **options
    )
    return model, run


def train(model: nn.Module, run: Checkpointer, to: int) -> dict[str, torch.Tensor]:
    """The weights after that many steps of the whole run."""
    for _, batch in run.steps(total_steps=to):
        model(batch).sum().backward()
        for x in run._state.optimizers:
            x.step()
            x.zero_grad()
        run.step()
    return {name: x.clone() for name, x in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of weights that no new model has."""
    model, run = make(tmp_path / "other")
    run.close()
    torch.save({k: v + 1 for k, v in model.state_dict().items()}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_begins_with_the_weights_and_goes_on_from_its_own(tmp_path: Path, weights: Path) -> None:
    model, run = make(tmp_path / "whole")
    assert run.resume(start_from=weights) is None
    begun: Any = run.started_from
    assert begun.source == str(weights)
    assert equal(dict(model.state_dict()), torch.load(weights, weights_only=True))
    wanted = train(model, run, 4)
    run.close()

    model, run = make(tmp_path / "cut")
    run.resume(start_from=weights)
    train(model, run, 2)
    run.save()
    run.close()
    weights.unlink()  # a run that goes on does not look at it
    model, run = make(tmp_path / "cut")
    resumed = run.resume(start_from=weights)
    assert resumed is not None
    assert resumed.bit_exact
    assert run.started_from is None
    assert equal(train(model, run, 4), wanted)
    run.close()


def test_one_killed_before_its_first_checkpoint_begins_with_them_again(
    tmp_path: Path, weights: Path
) -> None:
    seen = []
    for _ in range(2):
        model, run = make(tmp_path / "run")
        assert run.resume(start_from=weights) is None
        seen.append(train(model, run, 2))
        run.close()
    assert equal(*seen)


def test_anew_in_the_directory_of_another(tmp_path: Path, weights: Path) -> None:
    model, run = make(tmp_path / "run")
    run.resume()
    run.save()
    run.close()
    model, run = make(tmp_path / "run", fresh=True)
    assert run.resume(start_from=weights) is None
    assert equal(dict(model.state_dict()), torch.load(weights, weights_only=True))
    run.close()


def test_from_another_run_and_by_a_function(tmp_path: Path) -> None:
    first, run = make(tmp_path / "first")
    run.resume()
    wanted = train(first, run, 2)
    run.save()
    run.close()
    model, run = make(tmp_path / "second")
    run.resume(start_from=tmp_path / "first")
    assert equal(dict(model.state_dict()), wanted)
    assert run.step_count == 0
    run.close()
    model, run = make(tmp_path / "third")
    kept = model.state_dict()["2.weight"].clone()

    def begin(model: nn.Module) -> LoadedWeights:
        return load_weights(model, tmp_path / "first", strict="shapes", names={"2.": "old."})

    run.resume(start_from=begin)
    begun: Any = run.started_from
    assert begun.missing == ("2.weight", "2.bias")
    assert torch.equal(model.state_dict()["2.weight"], kept)
    assert torch.equal(model.state_dict()["0.weight"], wanted["0.weight"])
    run.close()


def test_weights_that_do_not_fit_leave_the_run_as_it_was(tmp_path: Path, weights: Path) -> None:
    model, run = make(tmp_path / "run")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    torch.save({"other": torch.ones(2)}, tmp_path / "x.pt")
    for start_from, kind in (
        (tmp_path / "x.pt", CheckpointMismatchError),
        (tmp_path / "none.pt", CheckpointError),
        (lambda _: None, ArgumentError),
    ):
        with pytest.raises(kind):
            run.resume(start_from=start_from)  # type: ignore[arg-type]
        assert equal(dict(model.state_dict()), before)
        assert run.started_from is None
    assert run.resume(start_from=weights) is None
    assert equal(dict(model.state_dict()), torch.load(weights, weights_only=True))
    run.close()
    assert not list((tmp_path / "run").glob("step-*"))
    shutil.rmtree(tmp_path / "run")
