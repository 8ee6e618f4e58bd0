"""torch's SAC estimator and integer program (`torch.distributed._tools`), made to run on CPU.

Its two ways of timing an operation both need CUDA: here each is timed on the CPU. Everything else
is torch's: trackers, trade-off curves, the program over modules and the one within a module.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import time
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy

from experiments.peers.checkpointing import NotApplicable, Policy
from experiments.peers.subject import Subject
from tests.suite import call

REPEATS = 3


class CpuTimes:
    """Milliseconds of an operation on real tensors of the same shapes, each signature once."""

    def __init__(self) -> None:
        self.known: dict[Any, float] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
        kwargs = kwargs or {}
        key = (func, repr(tree_map(_shape, (args, kwargs))))
        if key not in self.known:
            self.known[key] = self._timed(func, args, kwargs)
        return func(*args, **kwargs), self.known[key]

    def _timed(self, func: Any, args: Any, kwargs: Any) -> float:
        with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.no_grad():
            real_args, real_kwargs = tree_map(_real, (args, kwargs))
            try:
                func(*real_args, **real_kwargs)
                begin = time.process_time()
                for _ in range(REPEATS):
                    func(*real_args, **real_kwargs)
            except (RuntimeError, IndexError):
                return 0.0  # values matter: an index out of range
            return 1e3 * (time.process_time() - begin) / REPEATS


def _shape(x: Any) -> Any:
    return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x


def _real(x: Any) -> Any:
    if not isinstance(x, FakeTensor):
        return x
    # filled before it is strided: elements of an expanded tensor share their memory
    span = (
        1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    )
    out = torch.empty(span, dtype=x.dtype, device="cpu")
    out = out.uniform_() if x.dtype.is_floating_point else out.zero_()
    return out.as_strided(x.shape, x.stride())


def decided(subject: Subject, model: nn.Module, share: float) -> list[tuple[str, float, Any]]:
    """(path, share of memory to discard, the module's statistics) of what it checkpoints.

    Args:
        model: a copy that may be changed.
    """
    from torch.distributed._tools.ilp_utils import (
        aggregate_stats,
        get_peak_memory_runtime_baseline,
        parse_module_info,
    )
    from torch.distributed._tools.mem_tracker import MemTracker, _ModState
    from torch.distributed._tools.runtime_estimator import RuntimeEstimator
    from torch.distributed._tools.sac_estimator import SACEstimator
    from torch.distributed._tools.sac_ilp import sac_milp

    root = type(model).__name__
    times = CpuTimes()
    with FakeTensorMode() as mode, contextlib.redirect_stdout(io.StringIO()):
        fake = _faked(subject, model, mode)
        step = fake.step(model)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            step()
            last = tracker.get_tracker_snapshot("current")
        model.zero_grad(set_to_none=True)
        for stats in tracker.memory_tracking.values():
            # its hook after backward does not see modules whose inputs need no gradient
            for state in (_ModState.PRE_BW, _ModState.PEAK_BW, _ModState.POST_BW):
                stats.snapshots.setdefault(state, [copy.deepcopy(last)])
        runtime = RuntimeEstimator()
        with runtime("operator-level-benchmark"):
            runtime._estimate = times
            step()
        model.zero_grad(set_to_none=True)
        estimator = SACEstimator()
        with estimator("operator-level-benchmark"):
            estimator._estimate_runtime = times
            fake.loss_of(call(model, fake.batch))
        info = aggregate_stats(model, tracker, runtime, estimator, torch.device("cpu"))
        graph = parse_module_info(info)
        peak, _ = get_peak_memory_runtime_baseline(graph)
    logging.getLogger("torch.distributed._tools.sac_ilp").setLevel(logging.CRITICAL)
    chosen, _, found = sac_milp(
        graph,
        memory_budget=share * peak / 2**30,
        ac_units=[f"{root}.{path}" for path in subject.blocks],
    )
    if found == -1:
        raise NotApplicable(f"its program finds nothing at {share} of the peak that it sees")
    if not chosen:
        raise NotApplicable(f"it checkpoints nothing at {share} of the peak that it sees")
    return [
        (name.removeprefix(f"{root}."), discarded, estimator.sac_mod_stats[name])
        for name, discarded in chosen.items()
    ]


def _faked(subject: Subject, model: nn.Module, mode: FakeTensorMode) -> Subject:
    """The subject with a fake batch; the model's tensors become fake in place."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = mode.from_tensor(tensor)  # type: ignore[assignment]

    def fake(x: Any) -> Any:
        return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

    return dataclasses.replace(
        subject, model=model, batch=tree_map(fake, subject.batch), target=fake(subject.target)
    )


def saved_by(stats: Any, discarded: float) -> frozenset[tuple[str, int]]:
    """What the program within a module saves: names of operations and numbers of their calls.

    Raises:
        NotApplicable: it finds nothing.
    """
    from torch.distributed._tools.sac_ilp import get_optimal_checkpointing_policy_per_module

    decisions = get_optimal_checkpointing_policy_per_module(stats, 1 - discarded)
    if not decisions:
        raise NotApplicable("its program within a module finds nothing")
    seen: Counter[str] = Counter()
    saved = set()
    for name, keep in zip(stats.func_names, decisions, strict=True):
        if keep:
            saved.add((name, seen[name]))
        seen[name] += 1
    return frozenset(saved)


def policy_of(saved: frozenset[tuple[str, int]]) -> Policy:
    """For one call of a module: saves what `saved_by` found."""
    counts: Counter[str] = Counter()

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op._overloadpacket.__name__
        keep = (name, counts[name]) in saved
        counts[name] += 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
