"""Loaders as accelerate, torchdata and datasets make them: resumed at their exact place."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import actckpt

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

SIZE = 20
EPOCHS = 3


class Noisy(Dataset[torch.Tensor]):
    """Items of which a part is drawn when they are read."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = [torch.rand(()).item(), random.random(), np.random.rand()]
        return torch.tensor([float(index), *noise])


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def made(directory: Path, loader: Any) -> actckpt.Checkpointer:
    return actckpt.Checkpointer(
        directory, model=nn.Linear(1, 1), loader=loader, every=None, keep_last=None
    )


def by_steps(run: actckpt.Checkpointer, loader: Any, until: int = -1) -> list[Any]:
    """What `run.steps` gives, and what a loop draws beside."""
    found = []
    for _, batch in run.steps(epochs=EPOCHS):
        found.append((_rows(batch), torch.rand(()).item()))
        run.step()
        if run.step_count == until:
            break
    return found


def plainly(run: actckpt.Checkpointer, loader: Any, until: int = -1) -> list[Any]:
    """The same in a loop of one's own."""
    found = []
    for _ in range(run.epoch, EPOCHS):
        for batch in loader:
            found.append((_rows(batch), torch.rand(()).item()))
            run.step()
            if run.step_count == until:
                return found
    return found


def _rows(batch: Any) -> Any:
    return batch["x"].tolist() if isinstance(batch, dict) else batch.tolist()


def goes_on(make: Any, loop: Any, tmp_path: Path, untils: tuple[int, ...], length: int) -> None:
    """Runs killed after so many steps go on as the one that was not."""
    loader = make(1)
    run = made(tmp_path / "whole", loader)
    whole = loop(run, loader)
    run.close()
    assert len(whole) == length
    for until in untils:
        loader = make(1)
        run = made(tmp_path / str(until), loader)
        parts = loop(run, loader, until)
        run.save()
        run.close()
        loader = make(2)
        run = made(tmp_path / str(until), loader)
        resumed = run.resume()
        assert resumed is not None
        assert resumed.bit_exact, resumed.inexact
        assert parts + loop(run, loader) == whole, until
        run.close()


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "seedable": {"use_seedable_sampler": True},
    "stateful": {"use_stateful_dataloader": True},
    "stateful, seedable": {"use_stateful_dataloader": True, "use_seedable_sampler": True},
    "dispatched": {"dispatch_batches": True},
}


@pytest.mark.kind("a loader that accelerate prepared", bits=True, resumed="exact")
@pytest.mark.parametrize("loop", [by_steps, plainly])
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_accelerates(kind: str, loop: Any, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    utils = pytest.importorskip("accelerate.utils")
    state = pytest.importorskip("accelerate.state")

    def make(seed: int) -> Any:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()
        # a seed that is another after a restart would be another data order in seedable samplers
        seed_all(1 if "seedable" in kind else seed)
        configuration = utils.DataLoaderConfiguration(**CONFIGURATIONS[kind])
        accelerator = accelerate.Accelerator(cpu=True, dataloader_config=configuration)
        loader = accelerator.prepare(DataLoader(Noisy(), 4, shuffle=True))
        seed_all(seed)
        return loader

    try:
        goes_on(make, loop, tmp_path, (1, 4, 5, 7, 10), 15)
    finally:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()


def test_what_accelerate_gives_is_the_same_when_it_is_watched(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    utils = pytest.importorskip("accelerate.utils")
    state = pytest.importorskip("accelerate.state")
    for number, configuration in enumerate(CONFIGURATIONS.values()):
        read: list[list[Any]] = []
        for watched in (False, True):
            state.AcceleratorState._reset_state(True)
            state.GradientState._reset_state()
            seed_all(3)
            accelerator = accelerate.Accelerator(
                cpu=True, dataloader_config=utils.DataLoaderConfiguration(**configuration)
            )
            loader = accelerator.prepare(DataLoader(Noisy(), 4, shuffle=True))
            run = made(tmp_path / str(number), loader) if watched else None
            seed_all(4)
            read.append([])
            for _ in range(2):
                for batch in loader:
                    read[-1].append(
                        (batch.tolist(), torch.rand(()).item(), loader.end_of_dataloader)
                    )
            if run is not None:
                assert isinstance(loader, DataLoader)
                assert accelerator.prepare(loader) is loader
                run.close()
        assert read[0] == read[1]
    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()


@pytest.mark.kind("torchdata's StatefulDataLoader", bits=True, resumed="exact")
@pytest.mark.parametrize("loop", [by_steps, plainly])
@pytest.mark.parametrize("asked", [False, True], ids=["", "asked for its state before"])
def test_torchdatas(loop: Any, asked: bool, tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make(seed: int) -> Any:
        seed_all(seed)
        loader = stateful.StatefulDataLoader(Noisy(), 4, shuffle=True)
        if asked:
            loader.state_dict()
        return loader

    goes_on(make, loop, tmp_path, (1, 5, 7), 15)


def test_torchdatas_own_state_is_as_it_was(tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def states(watched: bool) -> list[Any]:
        seed_all(5)
        loader = stateful.StatefulDataLoader(Noisy(), 4, shuffle=True)
        run = made(tmp_path, loader) if watched else None
        found = [str(loader.state_dict()) for _ in range(2) for _ in loader]
        if run is not None:
            run.close()
        return found

    assert states(False) == states(True)


def rows(shards: list[int]) -> Iterator[dict[str, list[float]]]:
    for shard in shards:
        for n in range(5):
            yield {"x": [shard * 5.0 + n]}


@pytest.mark.kind("a StatefulDataLoader over a streamed data set", bits=True, resumed="exact")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffled_stream(workers: int, tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    datasets = pytest.importorskip("datasets")

    def make(seed: int) -> Any:
        seed_all(seed)
        data = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2, 3]})
        data = data.shuffle(seed=3, buffer_size=7).with_format("torch")
        return stateful.StatefulDataLoader(data, batch_size=2, num_workers=workers)

    goes_on(make, by_steps, tmp_path, (3,) if workers else (1, 7, 10, 15), 30)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The 'train_dataloader' does not")
@pytest.mark.kind("Lightning's fit loop, and Trainer's", resumed="said no")
def test_lightnings_loop_is_not_claimed(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def training_step(self, batch: Any, _: int) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

        def on_train_batch_end(self, *_: Any) -> None:
            run.step()

    loader = DataLoader(Noisy(), 4, shuffle=True)
    module = Module()
    run = actckpt.Checkpointer(tmp_path, model=module, loader=loader, every=None)
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    run.save()
    run.close()
    again = actckpt.Checkpointer(
        tmp_path, model=Module(), loader=DataLoader(Noisy(), 4, shuffle=True)
    )
    resumed = again.resume()
    assert resumed is not None
    assert any("the loop is Lightning's fit loop" in why for why in resumed.inexact)
    again.close()


@pytest.mark.kind("Lightning's fit loop, and Trainer's", resumed="said no")
def test_trainers_loop_is_not_claimed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.layer(x).square().mean()}

    class Saving(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            run.step()

    class Own(transformers.Trainer):  # type: ignore[misc, name-defined]
        def get_train_dataloader(self) -> Any:
            return loader

    def collate(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"x": torch.stack(items)}

    loader = DataLoader(Noisy(), 4, shuffle=True, collate_fn=collate)
    for name, kind, given in (("none", transformers.Trainer, None), ("own", Own, loader)):
        model = Model()
        run = actckpt.Checkpointer(tmp_path / name, model=model, loader=given, every=None)
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"),
            max_steps=3,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        kind(
            model, arguments, train_dataset=Noisy(), data_collator=collate, callbacks=[Saving()]
        ).train()
        run.save()
        run.close()
        again = actckpt.Checkpointer(tmp_path / name, model=Model(), loader=given, every=None)
        resumed = again.resume()
        assert resumed is not None
        said = "given no loader" if given is None else "the loop of transformers' Trainer"
        assert any(said in why for why in resumed.inexact), resumed.inexact
        again.close()
