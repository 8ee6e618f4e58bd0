"""Plans made and run on a CUDA device: peaks, times, gradients, buffers beside the predicted ones.

Every model runs in a process of its own; its arms share weights and optimizer, and take turns.
Beside them torch.utils.checkpoint on every block, our plan at its measured peak, and the plan that
`actckpt plan --device` makes from the data sheet. Without CUDA, `--quick` tries it on the CPU.

    python -m experiments.gpu [MODEL ...] [--quick] [--rounds N] [--seconds N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import actckpt
from experiments.arguments import add_models
from experiments.gpu_table import write
from experiments.progress import progress
from experiments.results import FOLDER
from experiments.timing import ratio
from tests.models.unet import UNet

SHARES = (0.5, 0.3, 0.75)  # in the order in which they are planned, as far as time allows
ROUNDS = 8
SEED = 0
# blocks that torch's function is put around
BLOCKS = frozenset(
    {"GPT2Block", "LlamaDecoderLayer", "ViTLayer", "ResNetBottleNeckLayer", "DoubleConv"}
)
QUICK = "ACTCKPT_EXPERIMENT_QUICK"  # read where `actckpt plan` builds a model

Row = dict[str, Any]
Built = tuple[nn.Module, dict[str, torch.Tensor]]


class WithLoss(nn.Module):
    """A model with its loss, as those of Hugging Face have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.model(pixel_values), labels)}


def gpt2() -> Built:
    from transformers import AutoModelForCausalLM, GPT2Config

    layers, width, batch, length = (3, 64, 2, 64) if _quick() else (24, 1024, 8, 1024)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model, _tokens(batch, length, config.vocab_size)


def llama() -> Built:
    from transformers import AutoModelForCausalLM, LlamaConfig

    layers, width, batch, length = (3, 128, 2, 64) if _quick() else (16, 2048, 4, 2048)
    config = LlamaConfig(
        vocab_size=1024 if _quick() else 128256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model, _tokens(batch, length, config.vocab_size)


def vit() -> Built:
    from transformers import AutoModelForImageClassification, ViTConfig

    layers, width, batch = (3, 64, 2) if _quick() else (24, 1024, 64)
    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 64,
        num_labels=1000,
    )
    model = AutoModelForImageClassification.from_config(config, dtype=torch.bfloat16)
    return model, _pixels(batch, 224, 1000, torch.bfloat16)


def resnet152() -> Built:
    from transformers import ResNetConfig, ResNetForImageClassification

    depths, batch, size = ([1, 1, 2, 1], 2, 64) if _quick() else ([3, 8, 36, 3], 64, 224)
    model = ResNetForImageClassification(ResNetConfig(depths=depths, num_labels=1000))
    return model, _pixels(batch, size, 1000, torch.float32)


def unet() -> Built:
    width, depth, batch, size = (8, 3, 2, 64) if _quick() else (64, 4, 4, 512)
    inputs = _pixels(batch, size, 4, torch.float32)
    inputs["labels"] = torch.randint(4, (batch, size, size))
    return WithLoss(UNet(width=width, depth=depth)), inputs


MODELS: dict[str, tuple[str, Callable[[], Built], str]] = {
    "gpt2": ("GPT-2 medium, bf16, 8 x 1024 tokens, dropout 0.1", gpt2, "adamw"),
    "llama": ("Llama of 1.2 B parameters, bf16, 4 x 2048 tokens", llama, "adamw"),
    "vit": ("ViT-L/16, bf16, 64 images of 224 x 224", vit, "adamw"),
    "resnet152": ("ResNet-152, float32, 64 images of 224 x 224", resnet152, "sgd"),
    "unet": ("U-Net, 4 levels from width 64, float32, 4 images of 512 x 512", unet, "adamw"),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


class Trial:
    """One model's arms: copies that share parameters, buffers and the optimizer."""

    def __init__(self, name: str, device: torch.device) -> None:
        torch.manual_seed(SEED)
        _, build, kind = MODELS[name]
        with torch.device(device):
            self.model, self.batch = build()
        self.model.train()
        self.device = device
        # a rate of zero: the arms share weights, and gradients are compared between steps
        self.optimizer = OPTIMIZERS[kind](self.model.parameters(), lr=0.0)
        self.arms: dict[str, nn.Module] = {"untouched": self.model, "again": self.copied()}
        self.expected: list[torch.Tensor] = []
        for _ in range(2):
            self.step(self.model)
            self.optimizer.step()
        self.clear()

    def copied(self) -> nn.Module:
        """Another arm's model, with the same parameters and buffers."""
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, shared)

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        gc.collect()

    def step(self, model: nn.Module) -> None:
        self.model.zero_grad(set_to_none=True)
        output = model(**self.batch)  # stays until backward ends, as a prediction has it
        output["loss"].backward()

    def resident_bytes(self) -> int:
        """Parameters, buffers, optimizer state and batch, in blocks of 512 bytes."""
        state = [v for s in self.optimizer.state.values() for v in s.values()]
        tensors = (*self.model.parameters(), *self.model.buffers(), *state, *self.batch.values())
        here = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors
            if isinstance(t, torch.Tensor) and t.device.type == self.device.type
        }
        return sum(-(-size // 512) * 512 for size in here.values())

    def peaks(self, model: nn.Module) -> Row:
        """Allocator's figures of one step with the optimizer's, from gradients None.

        What was allocated before and belongs to no resident, such as cuBLAS's workspace or the
        gradients to compare with, is taken off; the reserved bytes are those of an empty cache.
        """
        if self.device.type != "cuda":
            found = actckpt.measure(model, self.batch, optimizer=self.optimizer, steps=1)
            return {"allocated_bytes": found.peak_bytes}
        self.step(model)
        self.clear()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        stats = torch.cuda.memory_stats()
        beside = stats["allocated_bytes.all.current"] - self.resident_bytes()
        requested = stats["requested_bytes.all.current"]
        self.step(model)
        self.optimizer.step()
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        self.clear()
        added = stats["requested_bytes.all.peak"] - requested
        return {
            "allocated_bytes": stats["allocated_bytes.all.peak"] - beside,
            "requested_bytes": self.resident_bytes() + added,
            "reserved_bytes": stats["reserved_bytes.all.peak"],
            "beside_bytes": beside,
        }

    def equal(self, model: nn.Module) -> bool:
        """Whether gradients and buffers are bitwise those of the first model asked about."""
        torch.manual_seed(SEED)
        buffers = list(self.model.buffers())
        before = [b.clone() for b in buffers]
        self.step(model)
        found = [p.grad for p in self.model.parameters() if p.grad is not None] + buffers
        if not self.expected:
            self.expected = [t.clone() for t in found]
        same = len(found) == len(self.expected) and all(map(torch.equal, found, self.expected))
        for b, value in zip(buffers, before, strict=True):
            b.copy_(value)
        self.clear()
        return same

    def equal_deterministic(self, models: Mapping[str, nn.Module]) -> dict[str, bool | str]:
        """The same with deterministic kernels, for models that do not equal themselves."""
        self.expected = []
        found: dict[str, bool | str] = {}
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            for name, model in models.items():
                try:
                    found[name] = self.equal(model)
                except Exception as error:
                    found[name] = _failed(error)
        finally:
            torch.use_deterministic_algorithms(False)
        return found

    def timed(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of forward and backward, arms in turn."""
        times: dict[str, list[float]] = {name: [] for name in self.arms}
        names = list(self.arms)
        for number in range(-2, rounds):
            order = names if number % 2 else names[::-1]
            for name in order:
                seconds = self._seconds(self.arms[name])
                if number >= 0:
                    times[name].append(seconds)
        self.clear()
        return times

    def _seconds(self, model: nn.Module) -> float:
        if self.device.type != "cuda":
            begin_s = time.perf_counter()
            self.step(model)
            return time.perf_counter() - begin_s
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        self.step(model)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3


def run(name: str, path: Path, rounds: int, until: float) -> None:
    """Adds the rows of one model to the file, each as soon as it is there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trial = Trial(name, device)
    rows: dict[str, Row] = {}

    @contextmanager
    def case(what: str) -> Iterator[Row]:
        row = rows[what] = {"model": name, "case": what}
        try:
            yield row
        except Exception as error:
            traceback.print_exc()
            row["failed"] = _failed(error)
            trial.clear()
        _add(path, row)

    with case("untouched") as row:
        row |= trial.peaks(trial.model)
        trial.equal(trial.model)
        row["equal"] = trial.equal(trial.arms["again"])
        row["resident_bytes"] = resident = trial.resident_bytes()
        gradients = sum(p.numel() * p.element_size() for p in trial.model.parameters())
        activations = row["allocated_bytes"] - resident - gradients
    whole = rows["untouched"]["allocated_bytes"]
    budgets = {share: whole - round((1 - share) * activations) for share in SHARES}

    def planned(row: Row, what: str, budget_bytes: int, policy: Any = "auto") -> None:
        model = trial.copied()
        row["asked_bytes"] = budget_bytes
        begin = time.perf_counter()
        make = partial(
            actckpt.optimize, model, batch=trial.batch, optimizer=trial.optimizer, policy=policy
        )
        try:
            make(budget_gb=budget_bytes / 1e9)
        except actckpt.BudgetError as error:
            if error.smallest_bytes is None:
                raise
            budget_bytes = error.smallest_bytes
            make(budget_gb=budget_bytes / 1e9)
        row |= {"plan_s": time.perf_counter() - begin, "budget_bytes": budget_bytes}
        report = actckpt.report(model)
        row |= _figures(report)
        row["equal"] = trial.equal(model)
        row |= trial.peaks(model)
        row["within"] = row["allocated_bytes"] <= budget_bytes
        trial.arms[what] = model

    with case("torch") as row:
        model = trial.copied()
        for module in model.modules():
            if type(module).__name__ in BLOCKS:
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        row["equal"] = trial.equal(model)
        row |= trial.peaks(model)
        trial.arms["torch"] = model
    first, *others = (f"share {share}" for share in SHARES)
    asked = {first: budgets[SHARES[0]]}
    if "allocated_bytes" in rows["torch"]:
        asked["at torch's peak"] = rows["torch"]["allocated_bytes"]
    asked |= dict(zip(others, list(budgets.values())[1:], strict=True))
    sheet: subprocess.Popen[bytes] | None = None
    for what, budget_bytes in asked.items():
        if what != first and time.time() > until:
            continue
        with case(what) as row:
            planned(row, what, budget_bytes)
        if what == first:  # it plans beside the others
            sheet = _sheet(name, device, row.get("budget_bytes", budget_bytes), path.parent)
    assert sheet is not None
    with case("data sheet") as row:
        report = _finished(sheet, path.parent / f"{name}-sheet.json")
        row |= {f"sheet_{key}": value for key, value in _figures(report).items()}
        planned(row, "data sheet", rows[first]["budget_bytes"], lambda *_: report.plan)
    with case("times") as row:
        times = trial.timed(rounds)
        row["times_s"] = times
        row["step_s"] = {arm: statistics.median(found) for arm, found in times.items()}
        row["over_untouched"] = {
            arm: [r.low, r.median, r.high]
            for arm, r in ((a, ratio(t, times["untouched"])) for a, t in times.items())
        }
    if not rows["untouched"].get("equal", False):
        with case("deterministic") as row:
            row["equal"] = trial.equal_deterministic(trial.arms)


def _figures(report: actckpt.Report) -> Row:
    whole, planned = report.baseline.predicted, report.planned.predicted
    return {
        "predicted_bytes": planned.peak_bytes,
        "predicted_whole_bytes": whole.peak_bytes,
        "predicted_step_s": planned.step_s,
        "predicted_whole_step_s": whole.step_s,
        "predicted_overhead": planned.step_s / whole.step_s - 1,
        "regions": sum(1 for _ in report.plan.walk()),
        "bursts": sum(1 for _ in report.plan.walk_bursts()),
        "versions": report.versions,
    }


def _sheet(
    name: str, device: torch.device, budget_bytes: int, folder: Path
) -> subprocess.Popen[bytes]:
    """The process that plans from the data sheet."""
    here = torch.cuda.get_device_name() if device.type == "cuda" else ""
    kind = next((k for k in ("h200", "a100", "b200") if k.upper() in here), "h100-80gb")
    command = [
        sys.executable, "-m", "actckpt.cli", "plan", f"experiments.gpu:{name}", "--device", kind,
        "--optimizer", MODELS[name][2], "--budget-gb", f"{budget_bytes}B",
        "--save", str(folder / f"{name}-sheet.json"),
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _finished(process: subprocess.Popen[bytes], saved: Path) -> actckpt.Report:
    _, errors = process.communicate(timeout=120)
    if process.returncode:
        raise RuntimeError(errors.decode()[-500:])
    return actckpt.Report.from_json(saved.read_text(encoding="utf-8"))


def _add(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _failed(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _quick() -> bool:
    return QUICK in os.environ


def _tokens(batch: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (batch, length))
    return {"input_ids": ids, "labels": ids.clone()}


def _pixels(batch: int, size: int, classes: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    images = torch.randn(batch, 3, size, size).to(dtype)
    return {"pixel_values": images, "labels": torch.randint(classes, (batch,))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu", description=__doc__)
    add_models(parser, MODELS)
    parser.add_argument("--quick", action="store_true", help="small models; also on the CPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds, at least 2")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="for plans, about; shared among models"
    )
    parser.add_argument("--out", type=Path, help=f"folder of gpu.jsonl and gpu.md; else {FOLDER}")
    options = parser.parse_args()
    folder = options.out or (Path("runs/gpu") if options.quick else FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    if options.quick:
        os.environ[QUICK] = "1"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products
    names, until = options.models or list(MODELS), time.time() + options.seconds
    path = folder / "gpu_rows.jsonl"
    path.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    with progress(len(names), "models") as done:
        for i, name in enumerate(names):
            mine = time.time() + max(0.0, until - time.time()) / (len(names) - i)
            try:
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    pool.submit(run, name, path, options.rounds, mine).result()
            except Exception as error:  # the process may have died: the others go on
                _add(path, {"model": name, "case": "process", "failed": _failed(error)})
            done(name)
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            write(folder, rows, {name: what for name, (what, _, _) in MODELS.items()})


if __name__ == "__main__":
    main()
