"""The files of a DeepSpeed checkpoint: which there are, and what each holds.

`deepspeed` is not needed: three of its classes that the files name get stand-ins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actckpt.errors import CheckpointFormatError
from actckpt.foreign.torch_file import load_torch_file

LATEST = ("latest", "latest_universal")
# what of its own DeepSpeed writes into its files
_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
# of pipelines, and of mixtures of experts
_OTHER = re.compile(r"layer_\d+.*model_states\.pt|expp_rank_\d+.*\.pt")


@dataclass(frozen=True, slots=True)
class DeepSpeedFiles:
    """One checkpoint.

    Args:
        folder: of this step.
        model: what the files of the model hold, by rank; of one that is not sharded, one.
        optimizer: likewise; empty where the optimizer is not sharded, or is in `universal`.
        universal: the folder with a folder for each parameter, or None.
    """

    folder: Path
    model: tuple[Mapping[str, Any], ...]
    optimizer: tuple[Mapping[str, Any], ...]
    universal: Path | None


def is_deepspeed(folder: Path) -> bool:
    """Whether it looks like a folder of DeepSpeed, or of one step in it."""
    if any((folder / name).is_file() for name in LATEST):
        return True
    return any(_MODEL.fullmatch(path.name) or _OTHER.fullmatch(path.name)
               for path in folder.iterdir())  # fmt: skip


def read_files(folder: Path) -> DeepSpeedFiles:
    """What the newest step in a folder consists of.

    Raises:
        CheckpointFormatError: files are missing or damaged, or of a kind that is not read.
        OSError: it cannot be read.
    """
    folder = _step(folder)
    names = sorted(path.name for path in folder.iterdir())
    if other := next((name for name in names if _OTHER.fullmatch(name)), None):
        raise CheckpointFormatError(
            f"{folder} holds {other}: pipeline stages and mixtures of experts of DeepSpeed are not "
            "read. Convert it with DeepSpeed's own zero_to_fp32.py, and load that file"
        )
    models = _by_rank(folder, names, _MODEL)
    if not models:
        raise CheckpointFormatError(f"{folder} holds no model states of DeepSpeed")
    shards = _by_rank(folder, names, _OPTIMIZER)
    model = tuple(_held(path) for path in models)
    universal = folder / "zero" if (folder / "zero").is_dir() else None
    optimizer = tuple(_optimizer(path) for path in shards) if universal is None else ()
    counts = [o.get("partition_count") for o in optimizer]
    for count in counts:
        wanted = max(count) if isinstance(count, list) and count else count
        if wanted != len(shards):
            raise CheckpointFormatError(
                f"{folder} holds the optimizer states of {len(shards)} processes, and was saved by "
                f"{wanted}: copy the files of all"
            )
    for state in model:
        if state.get("mp_world_size", 1) != 1:
            raise CheckpointFormatError(
                f"{folder} was saved with tensor parallelism of {state['mp_world_size']}, which is "
                "not read: merge it where it was made"
            )
    return DeepSpeedFiles(folder, model, optimizer, universal)


def _step(folder: Path) -> Path:
    """The folder of a step: that which the file of the newest names, or this very one."""
    for name in LATEST:
        path = folder / name
        if not path.is_file():
            continue
        tag = path.read_bytes()[:256].decode("utf-8", "replace").strip()
        if not tag or tag != Path(tag).name or tag in (".", ".."):
            raise CheckpointFormatError(f"{path} names no folder beside it: {tag!r:.120}")
        if not (folder / tag).is_dir():
            raise CheckpointFormatError(f"{path} names {tag}, which is not there")
        return folder / tag
    return folder


def _by_rank(folder: Path, names: list[str], pattern: re.Pattern[str]) -> list[Path]:
    """The files of all ranks, in their order.

    Raises:
        CheckpointFormatError: one is missing.
    """
    found: dict[int, Path] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            rank = int(match[1] or 0)
            if int(match[2]) or rank in found:
                raise CheckpointFormatError(
                    f"{folder} holds {name}: a checkpoint of tensor parallelism, or two in one "
                    "folder; neither is read"
                )
            found[rank] = folder / name
    for rank in range(len(found)):
        if rank not in found:
            raise CheckpointFormatError(
                f"{folder} lacks a file of rank {rank}, and has those of {sorted(found)}"
            )
    return [found[rank] for rank in sorted(found)]


def _optimizer(path: Path) -> Mapping[str, Any]:
    found = _held(path).get("optimizer_state_dict")
    if not isinstance(found, Mapping):
        raise CheckpointFormatError(f"{path} holds no states of an optimizer")
    return found


def _held(path: Path) -> Mapping[str, Any]:
    found = load_torch_file(path, _CLASSES)
    if not isinstance(found, Mapping):
        raise CheckpointFormatError(f"{path} is no file of DeepSpeed")
    return found


def shapes_of(x: Any, where: str) -> dict[str, torch.Size]:
    """A table of shapes by name; empty for None.

    Raises:
        CheckpointFormatError: it is none.
    """
    table = {} if x is None else x
    known = isinstance(table, Mapping) and all(
        isinstance(name, str) and isinstance(shape, torch.Size) for name, shape in table.items()
    )
    if not known:
        raise CheckpointFormatError(f"{where} does not say what its parameters' shapes are")
    return dict(table)
