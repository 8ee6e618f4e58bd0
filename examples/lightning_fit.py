"""A LightningModule within a budget: one callback, and `training_step` is planned as it is.

    python examples/lightning_fit.py

Shows: Lightning's loop, logging and checkpoints of its own stay as they are.
"""

import tempfile

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from actckpt.integrations.lightning import MemoryBudget


class Classifier(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.head(self.encoder(inputs).mean(1)), labels)
        self.log("loss", loss, prog_bar=False)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(layers: int = 4, width: int = 64, budget: str = "16MB", epochs: int = 1) -> None:
    pl.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(32, 64, width), torch.randint(10, (32,)))
    with tempfile.TemporaryDirectory() as folder:
        memory = MemoryBudget(budget, checkpoints=f"{folder}/run", every=2)
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="auto",
            callbacks=[memory],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(layers, width), DataLoader(data, batch_size=8, num_workers=0))
        report = memory.report
        print(report)
        peaks = [arm.peak_bytes / 1e6 for arm in (report.planned, report.baseline)]
        print(f"peak {peaks[0]:.1f} MB of {peaks[1]:.1f}, budget {budget}")


if __name__ == "__main__":
    main()
