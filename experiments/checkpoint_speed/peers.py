"""What people save with today. None verifies; who does not sync either is named so."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from experiments.checkpoint_speed.subject import Arm, Subject


def peers(subject: Subject) -> dict[str, Arm]:
    """Of this environment. Needs a process group: asynchronous DCP asks for one."""
    arms: dict[str, Arm] = {
        "torch.save + fsync": lambda path: _torch_save(subject, path),
        "DCP save": lambda path: _dcp_save(subject, path),
        "DCP async_save, thread": lambda path: _dcp_async(
            subject, path, AsyncCheckpointerType.THREAD
        ),
        "DCP async_save, process": lambda path: _dcp_async(
            subject, path, AsyncCheckpointerType.PROCESS
        ),
    }
    if importlib.util.find_spec("lightning"):
        arms["Lightning Fabric save, not synced"] = _lightning(subject)
    if importlib.util.find_spec("orbax"):
        arms["Orbax async save, not synced"] = _orbax(subject)
    return arms


def process_group(folder: Path) -> None:
    """One of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)


def _nothing() -> None:
    """Is left to wait for."""


def _torch_save(subject: Subject, path: Path) -> Callable[[], object]:
    with open(path, "wb") as file:
        torch.save(subject.state(), file)
        file.flush()
        os.fsync(file.fileno())
    return _nothing


def _dcp_save(subject: Subject, path: Path) -> Callable[[], object]:
    dcp.state_dict_saver.save(subject.state(), checkpoint_id=path)
    return _nothing


def _dcp_async(subject: Subject, path: Path, kind: AsyncCheckpointerType) -> Callable[[], object]:
    future: Any = dcp.state_dict_saver.async_save(
        subject.state(), checkpoint_id=path, async_checkpointer_type=kind
    )
    return lambda: future.result()


def _lightning(subject: Subject) -> Arm:
    fabric: Any = importlib.import_module("lightning.fabric").Fabric(accelerator="cpu", devices=1)

    def save(path: Path) -> Callable[[], object]:
        fabric.save(path, {"model": subject.model, "optimizer": subject.optimizer})
        return _nothing

    return save


def _orbax(subject: Subject) -> Arm:
    saver: Any = importlib.import_module("orbax.checkpoint").StandardCheckpointer()

    def save(path: Path) -> Callable[[], object]:
        # windows on the tensors' own memory
        moments = subject.optimizer.state_dict()["state"].items()
        state = {
            "model": {k: v.numpy() for k, v in subject.model.state_dict().items()},
            "optimizer": {
                str(index): {k: v.numpy() for k, v in values.items()} for index, values in moments
            },
        }
        saver.save(path, state)
        return lambda: saver.wait_until_finished()

    return save
