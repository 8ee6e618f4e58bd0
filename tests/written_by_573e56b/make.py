"""The runs whose checkpoints lie beside this file; made once, by the tree of 573e56b.

    git worktree add ../before 573e56b
    PYTHONPATH=../before python tests/written_by_573e56b/make.py tests/written_by_573e56b

Written again by another tree they would show nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import actckpt

SAMPLES, BATCH = 48, 4
SAVED_AFTER = 5  # optimizer steps
BEYOND = 6  # batches after the checkpoint whose samples and losses were written down


class Samples(Dataset[Any]):
    """Each with its number."""

    def __init__(self, width: int) -> None:
        self.rows = torch.linspace(-1, 1, SAMPLES * width).view(SAMPLES, width)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return index, self.rows[index]


class Block(nn.Module):
    """A feed-forward block with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.gelu(self.up(self.norm(x)))
        out: torch.Tensor = x + self.down(self.dropout(y))
        return out


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """The loss of every run."""
    return output.square().mean()


class Tally:
    """Something of the user's own with a state."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = state["losses"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One run: how its model is planned, and how many batches an optimizer step takes."""

    policy: str
    share: float
    accumulate: int = 1
    width: int = 16


KINDS = {
    "operations": Kind("optimal", 0.75),
    "calls": Kind("full", 2.0, accumulate=2),
}


class Run:
    """The objects of a run, and its loop."""

    def __init__(self, kind: Kind, directory: Path, seed: int, budget_gb: float | None) -> None:
        torch.manual_seed(seed)
        self.kind = kind
        width = kind.width
        self.model = nn.Sequential(*(Block(width) for _ in range(4)), nn.BatchNorm1d(width))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=40)
        # made before the plan: the copies of a planned model are planned, too
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.tally = Tally()
        if budget_gb is None:
            batch = torch.linspace(-1, 1, BATCH * width).view(BATCH, width)
            measured = actckpt.measure(
                self.model, batch, loss_fn=loss_of, optimizer=self.optimizer, steps=1
            )
            budget_gb = kind.share * measured.added_bytes / 1e9
        self.budget_gb = budget_gb
        actckpt.optimize(
            self.model,
            budget_gb,
            loss_fn=loss_of,
            accumulate=kind.accumulate > 1,
            policy=kind.policy,
            scope="activations",
        )
        self.loader = DataLoader(Samples(width), BATCH, shuffle=True)
        self.checkpointer = actckpt.Checkpointer(
            directory,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            ema=self.ema,
            loader=self.loader,
            extra={"tally": self.tally},
            config={"kind": kind.policy},
            every=None,
        )

    def batches(self, begun: int = 0) -> Iterator[tuple[list[int], float]]:
        """Trains batch by batch; (the numbers of its samples, its loss) of each.

        Args:
            begun: batches of the current optimizer step that were trained on before.
        """
        every = self.kind.accumulate
        for number, (_, (indices, x)) in enumerate(self.checkpointer.steps(epochs=2), begun + 1):
            loss = loss_of(self.model(x))
            loss.backward()
            self.tally.losses.append(float(loss.detach()))
            if number % every == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
                self.ema.update_parameters(self.model)
                self.checkpointer.step({"loss": loss})
            yield indices.tolist(), float(loss.detach())


def main() -> None:
    """Writes every run below the given folder."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name, kind in KINDS.items():
        run = Run(kind, folder / name, seed=0, budget_gb=None)
        batches = run.batches()
        for _ in range(SAVED_AFTER * kind.accumulate + kind.accumulate // 2):
            next(batches)
        run.checkpointer.save(tag="fixture")
        record = {"budget_gb": run.budget_gb, "beyond": [next(batches) for _ in range(BEYOND)]}
        run.checkpointer.close()
        (folder / f"{name}.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
