"""Trainings of two processes under the three MemoryBudgets, and what is seen of each.

``python -m tests.trained_by_ranks FOLDER all RANK`` is one process of `tests.test_torchrun`: under
each trainer it trains untouched, then under a plan until it is stopped, then goes on from there.
`tests.faults.torchrun` starts and kills such trainings under torchrun.
"""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")  # of the libraries about each other

from tests.ranked import PORT, digests, group  # noqa: E402
from tests.trainer_models import Rows, Texts, next_row_loss  # noqa: E402
from tests.trainer_runs import Stopped, stop  # noqa: E402

SAMPLES, EPOCHS = 34, 2
# steps: 34 samples are 9 batches of two for each of two processes, and two batches a step
STOPPED_AT = 8


class Seen:
    """What a process trained on and came to.

    Args:
        seed: of all that is drawn, together with the number of the process.
        budget: what the MemoryBudget is given; None trains without one.
        after: so many steps ``stop`` is called, between two batches of the next.
    """

    def __init__(
        self,
        seed: int,
        budget: dict[str, Any] | None = None,
        after: int = -1,
        stop: Callable[[], Any] = stop,
    ) -> None:
        self._seed = seed + int(os.environ["RANK"])
        self.budget = budget
        self.losses: list[float] = []
        self.steps = 0
        self.logged: list[Any] = []
        self._after = after
        self._stop = stop

    def begins(self) -> None:
        """All is imported that draws for it."""
        random.seed(self._seed)
        torch.manual_seed(self._seed)

    def loss(self, loss: torch.Tensor) -> None:
        """A batch was trained on."""
        self.losses.append(loss.item())
        if self.steps == self._after:
            self._stop()


Trained = tuple[nn.Module, torch.optim.Optimizer, Any]


def with_trainer(folder: Path, seen: Seen) -> Trained:
    """transformers' Trainer."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainerCallback

    from actckpt.integrations.transformers import MemoryBudget
    from tests.trained import history, make_trainer

    AcceleratorState._reset_state(True)
    seen.begins()

    class Telling(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.steps = state.global_step

    class Watched(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(model, *args, **kwargs)
            if model.training:
                seen.loss(found)
            return found

    budget = None if seen.budget is None else MemoryBudget(None, **seen.budget)
    trainer = make_trainer(
        folder, Telling(), *([] if budget is None else [budget]), data=Texts(SAMPLES),
        kind=Watched, num_train_epochs=EPOCHS, eval_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    seen.logged = history(trainer)
    return trainer.model, trainer.optimizer, budget


def with_accelerate(folder: Path, seen: Seen) -> Trained:
    """A loop of one's own."""
    import accelerate
    from accelerate.state import AcceleratorState, GradientState

    from actckpt.integrations.accelerate import MemoryBudget

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    seen.begins()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, schedule = _made()
    loader = DataLoader(Rows(SAMPLES, 4), 2, shuffle=True)
    budget = None if seen.budget is None else MemoryBudget(accelerator, None, **seen.budget)
    if budget is None:
        prepared = accelerator.prepare(model, optimizer, loader, schedule)
        called, optimizer, loader, schedule = prepared
        batches: Any = ((0, batch) for _ in range(EPOCHS) for batch in loader)
    else:
        called, optimizer, loader, schedule = budget.prepare(model, optimizer, loader, schedule)
        batches = budget.steps(epochs=EPOCHS)
    for made, batch in batches:
        with accelerator.accumulate(called):
            loss = next_row_loss(called(batch), batch)
            accelerator.backward(loss)
            seen.steps = made + accelerator.sync_gradients
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seen.loss(loss)
    return model, optimizer.optimizer, budget


def with_lightning(folder: Path, seen: Seen) -> Trained:
    """Lightning's Trainer."""
    import lightning

    from actckpt.integrations.lightning import MemoryBudget
    from tests.fitted import Lit, fit

    class Telling(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            seen.steps = trainer.global_step
            seen.loss(outputs["loss"])

    seen.begins()
    budget = None if seen.budget is None else MemoryBudget(None, **seen.budget)
    model = Lit()
    trainer = fit(
        model, Telling(), *([] if budget is None else [budget]), max_epochs=EPOCHS, devices=2,
        strategy="ddp", loader=DataLoader(Rows(SAMPLES), 2, shuffle=True),
    )  # fmt: skip
    seen.logged = model.history
    return model, trainer.optimizers[0], budget


def _made() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)


KINDS = {"trainer": with_trainer, "accelerate": with_accelerate, "lightning": with_lightning}


def trained(folder: Path, kind: str, seen: Seen) -> dict[str, Any]:
    """What a training came to in this process."""
    model, optimizer, budget = KINDS[kind](folder, seen)
    found: dict[str, Any] = {
        "losses": seen.losses,
        "logged": seen.logged,
        "state": digests(model.state_dict(), optimizer.state_dict()),
        "drawn": [torch.rand(2).tolist(), random.random()],
    }
    if budget is not None:
        resumed, run = budget.resumed, budget.run
        found["resumed"] = None if resumed is None else [resumed.step, list(resumed.inexact)]
        found["difference"] = str(run.verified.difference)
        found["saved"] = [run.last_save.step, run.last_save.verdict]
    return found


def as_launched(rank: int) -> None:
    """This process is from now on what torchrun would have made of it."""
    told = {
        "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ[PORT], "TORCHELASTIC_RUN_ID": "here",
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in told.items()})


def main(folder: Path, scenario: str, rank: int) -> None:
    """Trains three times under each trainer, and writes what came of it."""
    torch.set_num_threads(1)
    as_launched(rank)
    found: dict[str, Any] = {}
    for kind in KINDS:
        kept = {"checkpoints": folder / kind, "every": 3, "policy": "full"}
        here = found[kind] = {}
        with group(folder, f"{kind}-whole", rank, 2):
            here["whole"] = trained(folder, kind, Seen(3))
        with group(folder, f"{kind}-stopped", rank, 2), suppress(Stopped):
            here["stopped"] = trained(folder, kind, Seen(3, kept, STOPPED_AT))
        with group(folder, f"{kind}-resumed", rank, 2):
            here["resumed"] = trained(folder, kind, Seen(5, kept))
    (folder / f"{scenario}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
