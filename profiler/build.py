"""The profile of a graph: each distinct operation measured on the device, or estimated."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from actckpt.data.graph import Graph
from actckpt.data.profile import Cost, Profile
from actckpt.errors import PlanError
from actckpt.profiler.arguments import input_bytes
from actckpt.profiler.devices import DEVICES, find_device
from actckpt.profiler.roofline import Machine, calibrate, estimate, machine_of, output_bytes
from actckpt.profiler.store import CostStore, cache_folder
from actckpt.profiler.timing import Place, alone, time_ops, workspaces
from actckpt.progress import is_shown, stage
from actckpt.versions import processor_name

_LARGEST_BYTES = 2 * 10**9
_CHUNK = 64
_SUSPECT = 8.0
_SUSPECT_S = 1e-3
_AGAIN_S = 2.0
_ROUNDS = 3


def build_profile(
    graph: Graph,
    *,
    device: str | None = None,
    measure: bool = True,
    cache_dir: Path | None = None,
    progress: bool | None = None,
) -> Profile:
    """What each of the graph's distinct operations costs on a device.

    Costs come from the disk cache where they are known, else from running the operation alone
    (under 2 GB of inputs and outputs), else, where that fails, from the roofline.

    Args:
        device: a torch device, or a name in `DEVICES` to estimate for one that is not here; None:
            the one that the graph was traced for.
        measure: run operations that the cache does not know; False estimates them.
        cache_dir: folder of the cache; None: ``$ACTCKPT_CACHE``, or where this system keeps caches.
        progress: show a bar on standard error; None: if that is a terminal.

    Raises:
        PlanError: the device is neither torch's nor known by name.
    """
    target = device or graph.stands_for or graph.device
    table = _table_machine(target)
    if table is not None:
        return _estimated(graph, table)
    here = torch.device(target.lower())
    traced = torch.device(graph.device).type

    def place(recorded: torch.device) -> torch.device:
        return here if recorded.type in (traced, here.type) else recorded

    store = CostStore(cache_dir or cache_folder(), environment(here))
    known = store.costs(graph.signatures)
    with alone(here):
        machine = store.machine()
        if machine is None:
            machine = calibrate(here, device_name(here))
            store.put_machine(machine)
        missing = [s for s in dict.fromkeys(graph.signatures) if s not in known]
        if not measure:
            known.update({s: estimate(s, machine) for s in missing})
            missing = []
        with _bar(len(missing), progress) as advance:
            for start in range(0, len(missing), _CHUNK):
                part = missing[start : start + _CHUNK]
                fresh = _measure(part, machine, here, place)
                # estimates are made anew: what cannot be measured today may be tomorrow
                store.put({s: c for s, c in fresh.items() if c.source == "measured"})
                known.update(fresh)
                advance(len(part))
            calmer = _again({s: known[s] for s in missing}, machine, here, place)
            store.put(calmer)
            known.update(calmer)
    return Profile(
        device=machine.name,
        costs=_by_owner(graph, [known[s] for s in graph.signatures]),
        dispatch_s=machine.dispatch_s,
    )


def _by_owner(graph: Graph, costs: list[Cost]) -> tuple[Cost, ...]:
    """Backward operations that could not be run alone cost twice their forward, as flops do."""
    for op in graph.ops:
        cost = costs[op.signature]
        if op.owner < 0 or cost.source != "roofline":
            continue
        forward = costs[graph.ops[op.owner].signature]
        if forward.source == "measured" and 2 * forward.time_s > cost.time_s:
            costs[op.signature] = Cost(
                2 * forward.time_s, forward.workspace_bytes, source="roofline"
            )
    return tuple(costs)


def device_name(device: torch.device) -> str:
    """The processor's or accelerator's own name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return processor_name()


def environment(device: torch.device) -> str:
    """All that a cost depends on beside its signature: device, threads, torch, numeric modes."""
    return "|".join(
        (
            device.type,
            device_name(device),
            f"threads {torch.get_num_threads()}",
            f"torch {torch.__version__}",
            f"matmul {torch.get_float32_matmul_precision()}",
            f"deterministic {torch.are_deterministic_algorithms_enabled()}",
        )
    )


def _measure(
    signatures: list[str], machine: Machine, device: torch.device, place: Place
) -> dict[str, Cost]:
    fitting = [s for s in signatures if input_bytes(s) + output_bytes(s) <= _LARGEST_BYTES]
    times = time_ops(fitting, device, place)
    scratch = workspaces(list(times), device, place)
    costs = {s: estimate(s, machine) for s in signatures if s not in times}
    for (signature, seconds), bytes_ in zip(times.items(), scratch, strict=True):
        costs[signature] = Cost(seconds, bytes_, "measured")
    return costs


def _again(
    costs: Mapping[str, Cost], machine: Machine, device: torch.device, place: Place
) -> dict[str, Cost]:
    """Better times for operations that took far longer than the roofline says, where there are.

    While another process holds a core, every parallel operation waits for scheduler ticks: such
    seconds pass, but a bad cost would stay in the cache.
    """
    slow = {
        s: c
        for s, c in costs.items()
        if c.source == "measured"
        and c.time_s > max(_SUSPECT_S, _SUSPECT * estimate(s, machine).time_s)
    }
    better: dict[str, Cost] = {}
    deadline = time.perf_counter() + _AGAIN_S
    for _ in range(_ROUNDS):
        if not slow or time.perf_counter() > deadline:
            break
        for signature, seconds in time_ops(list(slow), device, place).items():
            cost = slow[signature]
            if seconds < better.get(signature, cost).time_s:
                better[signature] = replace(cost, time_s=seconds)
    return better


def _estimated(graph: Graph, machine: Machine) -> Profile:
    """The profile of an accelerator, of whose host's work only a share is seen.

    The host queues kernels ahead of the device, so what the replay engine adds to it is hidden
    while the device has enough to do: the share is the host's time over the device's.
    """
    costs = {s: estimate(s, machine) for s in dict.fromkeys(graph.signatures)}
    device_s = sum(costs[graph.signatures[op.signature]].time_s for op in graph.ops)
    host_s = len(graph.ops) * (machine.launch_s + machine.dispatch_s)
    seen = min(1.0, host_s / device_s) if device_s else 1.0
    engine = Profile(machine.name, ())
    return Profile(
        device=machine.name,
        costs=tuple(costs[s] for s in graph.signatures),
        dispatch_s=seen * machine.dispatch_s,
        region_s=seen * engine.region_s,
        save_s=seen * engine.save_s,
        follow_s=seen * engine.follow_s,
        pass_s=seen * engine.pass_s,
        stretch_s=seen * engine.stretch_s,
        burst_s=seen * engine.burst_s,
        burst_op_s=seen * engine.burst_op_s,
        burst_save_s=seen * engine.burst_save_s,
    )


def _table_machine(target: str) -> Machine | None:
    found = find_device(target)
    if found is not None:
        return machine_of(found)
    try:
        kind = torch.device(target.lower()).type
    except RuntimeError:
        raise PlanError(
            f"no device {target!r}; use cpu, cuda, or one of {', '.join(DEVICES)}"
        ) from None
    if kind == "cuda" and torch.cuda.is_available():
        return None
    if kind == "cpu":
        return None
    raise PlanError(
        f"device {target!r} is not here; to estimate for one, name it: {', '.join(DEVICES)}"
    )


@contextmanager
def _bar(total: int, progress: bool | None) -> Iterator[Callable[[int], None]]:
    if total and is_shown():
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            stage(f"measuring operations, {done} of {total}")

        advance(0)
        yield advance
        return
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress or not total:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring operations", total=total)
        yield lambda count: bar.advance(task, count)
