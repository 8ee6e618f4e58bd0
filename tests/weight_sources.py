"""What tests load weights from: a small model, and each kind of file that holds it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import actckpt


class Net(nn.Module):
    """A tied matrix, another dtype, statistics, and an own name that looks like a wrapper's."""

    def __init__(self, out: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.module = nn.Linear(4, 4)
        self.narrow = nn.Linear(4, 4).bfloat16()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, out, bias=False)
        if out == 7:
            self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        y: torch.Tensor = self.head(self.norm(self.module(self.embedding(x))))
        return y


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Dtype, shape and every bit."""
    flat = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is in it now."""
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_holds(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in found if not same(found[name], wanted[name])] == []


def trained(out: int = 7) -> Net:
    """With values that no new one has."""
    torch.manual_seed(1)
    model = Net(out)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x))
        model.norm.running_mean.uniform_()  # type: ignore[union-attr]
        model.norm.num_batches_tracked.add_(3)  # type: ignore[union-attr]
    return model


# sources: each writes the weights of a model into a folder, and says what to load


def as_safetensors(model: nn.Module, folder: Path) -> Path:
    save_file(copied(model), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def as_folder_of_it(model: nn.Module, folder: Path) -> Path:
    save_file(copied(model), folder / "model.safetensors")
    return folder


def as_shards(model: nn.Module, folder: Path, ending: str = "safetensors") -> Path:
    state = copied(model)
    table = {name: f"part-{n % 2}.{ending}" for n, name in enumerate(state)}
    for file in set(table.values()):
        part = {name: x for name, x in state.items() if table[name] == file}
        if ending == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    name = "model.safetensors" if ending == "safetensors" else "pytorch_model.bin"
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def as_bin_shards(model: nn.Module, folder: Path) -> Path:
    return as_shards(model, folder, "bin")


def as_bin(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def as_pt(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def as_old_pt(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


def as_checkpoint_of_a_loop(model: nn.Module, folder: Path) -> Path:
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    state = {"epoch": 3, "model_state_dict": model.state_dict(), "optimizer": optimizer}
    torch.save(state, folder / "loop.pt")
    return folder / "loop.pt"


def as_run(model: nn.Module, folder: Path) -> Path:
    with actckpt.Checkpointer(folder / "run", model=model) as run:
        run.save()
    return folder / "run"


def as_step_of_a_run(model: nn.Module, folder: Path) -> Path:
    return next(as_run(model, folder).glob("step-*"))


def as_wrapped(model: nn.Module, folder: Path) -> Path:
    """As of a compiled model in DistributedDataParallel."""
    state = {f"module._orig_mod.{name}": x for name, x in copied(model).items()}
    torch.save(state, folder / "wrapped.pt")
    return folder / "wrapped.pt"


def as_checkpoint_beside_a_random_state(model: nn.Module, folder: Path) -> Path:
    state = {"rng": torch.get_rng_state(), "model": model.state_dict(), "ema": {"a": torch.ones(1)}}
    torch.save(state, folder / "random.pt")
    return folder / "random.pt"


def as_average(model: nn.Module, folder: Path) -> Path:
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    torch.save(average.state_dict(), folder / "average.pt")
    return folder / "average.pt"


def as_export(model: nn.Module, folder: Path, format: str = "safetensors") -> Path:
    actckpt.export(model, folder / "out", format=format)
    return folder / "out"


def as_export_pt(model: nn.Module, folder: Path) -> Path:
    return as_export(model, folder, "pt")


def as_export_hf(model: nn.Module, folder: Path) -> Path:
    return as_export(model, folder, "huggingface")


SOURCES = [
    as_safetensors, as_folder_of_it, as_shards, as_bin_shards, as_bin, as_pt, as_old_pt,
    as_checkpoint_of_a_loop, as_run, as_step_of_a_run, as_wrapped, as_average,
    as_checkpoint_beside_a_random_state,
    as_export, as_export_pt, as_export_hf,
]  # fmt: skip
