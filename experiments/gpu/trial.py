"""One model on one device: arms that share weights, and what a step of each takes and makes."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import actckpt
from experiments.gpu.subjects import MODELS, OPTIMIZERS

SEED = 0

Row = dict[str, Any]


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
                    found[name] = failure_of(error)
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


def failure_of(error: BaseException) -> str:
    """What an error says, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
