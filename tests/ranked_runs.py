"""What the ranks of `tests.test_many_ranks` do.

``python -m tests.ranked_runs FOLDER SCENARIO RANK`` is one of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import actckpt
from tests.ranked import Seeing, built, digests, group, meshed, train


def resharded(folder: Path, rank: int) -> dict[str, Any]:
    """Two ranks train, save and go on; the same two, one, three and four come back to it."""
    found: dict[str, Any] = {}
    runs = folder / "run"
    if rank < 2:
        with group(folder, "first", rank, 2):
            model, optimizer = built(2)
            torch.manual_seed(rank)
            run = actckpt.Checkpointer(runs, model=model, optimizer=optimizer, every=None)
            assert run.resume() is None
            train(model, optimizer, range(2), run.step)
            made = run.save()
            found["saved"] = digests(model.state_dict(), optimizer.state_dict())
            found["metrics"] = [made.step, made.size_bytes]
            train(model, optimizer, range(2, 4), run.step)
            found["went on"] = digests(model.state_dict(), optimizer.state_dict())
            found["drew"] = torch.rand(3).tolist()
            run.close()
    if not rank:
        # without a group: from many to one, and what three will read
        model, optimizer = built(0)
        run = actckpt.Checkpointer(runs, model=model, optimizer=optimizer, every=None)
        assert run.resume() is not None
        found["loaded 0"] = digests(model.state_dict(), optimizer.state_dict())
        run.close()
        run = actckpt.Checkpointer(folder / "one", model=model, optimizer=optimizer, every=None)
        train(model, optimizer, range(1), run.step)
        run.save()
        found["saved by one"] = digests(model.state_dict(), optimizer.state_dict())
        run.close()
    for world in (2, 1, 3, 4):
        if rank >= world:
            continue
        with group(folder, f"again-{world}", rank, world, last=world == 4):
            model, optimizer = built(world)
            run = actckpt.Checkpointer(runs, model=model, optimizer=optimizer, every=None)
            resumed = run.resume()
            assert resumed is not None
            found[f"loaded {world}"] = digests(model.state_dict(), optimizer.state_dict())
            found[f"tied {world}"] = model.head.weight is model.embedding.weight
            found[f"inexact {world}"] = list(resumed.inexact)
            if world == 2:
                train(model, optimizer, range(run.step_count, 4), run.step)
                found["came again"] = digests(model.state_dict(), optimizer.state_dict())
                found["drew again"] = torch.rand(3).tolist()
                found["compared"] = [run.verified.steps, run.verified.difference is None]
            run.close()
            if world == 3:
                run = actckpt.Checkpointer(
                    folder / "one", model=model, optimizer=optimizer, every=None
                )
                run.resume()
                found["loaded from one"] = digests(model.state_dict(), optimizer.state_dict())
                run.close()
    return found


def replicated(folder: Path, rank: int) -> dict[str, Any]:
    """DistributedDataParallel: all have everything, but for what each keeps of its own data."""
    found: dict[str, Any] = {}

    def begun(
        world: int, size: int, groups: int = 1, at: str = "run", every: str | None = None
    ) -> Any:
        torch.manual_seed(7)
        model = Seeing()
        wrapped = nn.parallel.DistributedDataParallel(model)
        parameters = [*model.parameters()]
        optimizer = torch.optim.AdamW(
            [{"params": parameters[n::groups]} for n in range(groups)], lr=0.1
        )
        numbered = torch.utils.data.TensorDataset(torch.arange(96), torch.randn(96, 4))
        sampler: Any = DistributedSampler(numbered, num_replicas=world, rank=rank)
        loader = DataLoader(numbered, batch_size=size, sampler=sampler)
        torch.manual_seed(rank)
        run = actckpt.Checkpointer(
            folder / at, model=wrapped, optimizer=optimizer, loader=loader, every=every
        )
        return run, wrapped, optimizer, loader

    def go_on(run: Any, model: Any, optimizer: Any, until: int, save: int = -1) -> list[Any]:
        seen = []
        for _, (numbers, x) in run.steps(epochs=2, total_steps=until):
            seen.append(numbers.tolist())
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            if run.step_count == save:
                run.save()
        return seen

    def here(model: Any, optimizer: Any) -> dict[str, str]:
        return digests(model.module.state_dict(), optimizer.state_dict())

    if rank < 2:
        with group(folder, "first", rank, 2):
            run, model, optimizer, _ = begun(2, 4)
            assert run.resume() is None
            run.save()  # of an optimizer that has made no step
            assert not optimizer.state
            found["seen"] = go_on(run, model, optimizer, 8, save=5)
            found["went on"] = here(model, optimizer)
            run.close()
            run, model, optimizer, _ = begun(2, 4)
            found["exact"] = run.resume().bit_exact
            found["seen again"] = go_on(run, model, optimizer, 8)
            found["came again"] = here(model, optimizer)
            run.close()
            # the clock of one says when all save, and a signal to one ends all
            run, model, optimizer, _ = begun(2, 4, at="clock", every="0.001s")
            go_on(run, model, optimizer, 4)
            run.close()
            found["clock"] = [[c.step for c in run.list()], run.last_save.verdict]
            run, model, optimizer, _ = begun(2, 4, at="signal")
            try:
                for _, (_, x) in run.steps(epochs=1):
                    if rank and run.step_count == 2:
                        os.kill(os.getpid(), signal.SIGTERM)
                    model(x).sum().backward()
                    optimizer.step()
                    run.step()
            except SystemExit as error:
                found["ended"] = [error.code, run.step_count, run.last_save.step]
            run.close()
            # one rank alone has other groups: nobody goes on
            run, model, optimizer, _ = begun(2, 4, groups=1 + rank)
            before = here(model, optimizer)
            try:
                run.resume()
            except actckpt.CheckpointMismatchError as error:
                found["refused"] = str(error)
            found["untouched"] = before == here(model, optimizer)
            run.close()
    if not rank:
        # a bit turns in what rank 1 alone reads
        shutil.copytree(folder / "run", folder / "turned")
        state = folder / "turned" / "step-00000005" / "random-00001.safetensors"
        data = bytearray(state.read_bytes())
        data[-1] ^= 4
        state.write_bytes(data)
    if rank < 2:
        with group(folder, "turned", rank, 2):
            run, *_ = begun(2, 4, at="turned")
            resumed = run.resume()
            found["turned"] = [resumed.step, *(skipped.reason for skipped in resumed.skipped)]
            run.close()
    for world, size in ((1, 8), (4, 2)):
        if rank < world:
            with group(folder, f"world-{world}", rank, world, last=world == 4):
                run, model, optimizer, _ = begun(world, size)
                found[f"inexact {world}"] = list(run.resume().inexact)
                found[f"seen {world}"] = go_on(run, model, optimizer, 8)
                found[f"drew {world}"] = torch.rand(1).item()
                run.close()
    return found


def meshes(folder: Path, rank: int) -> dict[str, Any]:
    """From each way to cut a model to the next, each reading what the one before wrote."""
    found: dict[str, Any] = {}

    def here(model: Any, optimizer: Any) -> dict[str, str]:
        names = dict(model.named_parameters())
        state = {n: optimizer.state[p] for n, p in names.items()}
        return digests(names, state)

    with group(folder, "all", rank, 4, last=True):
        before = ""
        for kind in ("fsdp", "fsdp x tp", "hsdp", "tp", "pipeline", "plain", "pipeline"):
            model, optimizer = meshed(kind, 4)
            if before:
                run = actckpt.Checkpointer(
                    folder / before, model=model, optimizer=optimizer, every=None
                )
                run.resume()
                run.close()
            else:
                for p in model.parameters():
                    p.grad = torch.ones_like(p) * p.detach()
                optimizer.step()
            found[kind] = here(model, optimizer)
            state = get_optimizer_state_dict(model, optimizer)["state"]
            found[f"names {kind}"] = [sorted(get_model_state_dict(model)), sorted(state)]
            run = actckpt.Checkpointer(
                folder / kind, model=model, optimizer=optimizer, every=None, fresh=True
            )
            run.save()
            run.close()
            before = kind
    return found


SCENARIOS = {"meshes": meshes, "resharded": resharded, "replicated": replicated}


def main(folder: Path, scenario: str, rank: int) -> None:
    """Runs one scenario, and writes what came of it."""
    torch.set_num_threads(1)
    found = SCENARIOS[scenario](folder, rank)
    (folder / f"{scenario}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
