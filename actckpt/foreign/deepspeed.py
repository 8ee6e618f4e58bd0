"""ZeRO checkpoints of DeepSpeed, put together: weights in the optimizer's precision, and moments.

Stages 1 and 2 keep, for each group of parameters, one flat vector, of which each rank has an even
share; stage 3 shares out every parameter by itself. What their optimizer does not train is in the
states of the model; so are, for stage 0, all the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from actckpt.errors import CheckpointFormatError
from actckpt.foreign.deepspeed_files import DeepSpeedFiles, read_files, shapes_of
from actckpt.foreign.stored import StoredTensor, held
from actckpt.foreign.torch_file import load_torch_file

# what the weights are called beside the moments: exp_avg, exp_avg_sq
WEIGHTS = "model"
_FLAT = "fp32_flat_groups"
_SHARE = "single_partition_of_fp32_groups"

Named = dict[str, dict[str, StoredTensor]]


def read_deepspeed(folder: Path) -> Named:
    """The weights, under "model", and each moment of the optimizer, by the names of parameters.

    Raises:
        CheckpointFormatError: damaged, incomplete, hostile, or of a kind that is not read.
        OSError: it cannot be read.
    """
    try:
        files = read_files(folder)
        return _read(files, str(files.folder))
    except CheckpointFormatError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointFormatError(f"{folder} has another layout: {error!r:.200}") from error


def _read(files: DeepSpeedFiles, where: str) -> Named:
    first = files.model[0]
    shapes = [shapes_of(group, where) for group in first.get("param_shapes") or ()]
    stage_3 = bool(files.optimizer) and _FLAT in files.optimizer[0]
    module = _tensors(first.get("module"), f"{where}: module")
    found: Named = {WEIGHTS: _untrained(files, module, where)}
    if files.universal is not None:
        trained = {name: shape for group in shapes for name, shape in group.items()}
        _merge(found, _universal(files.universal, trained))
    elif stage_3:
        _merge(found, _of_shared_parameters(files.optimizer, shapes, where))
    elif files.optimizer:
        _merge(found, _of_shared_vectors(files.optimizer, shapes, where))
    trained_names = {name for group in shapes for name in group}
    if lost := sorted(trained_names - found[WEIGHTS].keys()):
        raise CheckpointFormatError(f"{where} lacks {lost[0]}, which it says it has")
    # a second name of one tensor: what the files have under it is rounded
    for name, other in (first.get("shared_params") or {}).items():
        for table in found.values():
            if other in table:
                table[str(name)] = table[other]
    return found


def _merge(found: Named, more: Named) -> None:
    for key, table in more.items():
        found.setdefault(key, {}).update(table)


def _tensors(state: Any, where: str) -> dict[str, StoredTensor]:
    if not isinstance(state, Mapping):
        raise CheckpointFormatError(f"{where} is no state of a model")
    return {
        str(name): held(x, f"{where}: {name}")
        for name, x in state.items()
        if isinstance(x, torch.Tensor)
    }


def _untrained(
    files: DeepSpeedFiles, module: dict[str, StoredTensor], where: str
) -> dict[str, StoredTensor]:
    """Buffers, frozen parameters, and whatever else the model's own state has whole."""
    first = files.model[0]
    frozen = shapes_of(first.get("frozen_param_shapes"), where)
    buffers = set(first.get("buffer_names") or ())
    known = {n: s for group in first.get("param_shapes") or () for n, s in group.items()} | frozen
    # stage 3 leaves parameters empty there
    is_sharded = any(n in module and module[n].shape != tuple(s) for n, s in known.items())
    found = {n: x for n, x in module.items() if not is_sharded or n in buffers}
    for name, shape in frozen.items():
        parts = [state["frozen_param_fragments"][name] for state in files.model]
        if is_sharded:
            found[name] = _joined(name, parts, shape, where)
        else:
            found[name] = held(parts[0], f"{where}: {name}")
    return found


def _of_shared_vectors(
    optimizer: Sequence[Mapping[str, Any]], shapes: list[dict[str, torch.Size]], where: str
) -> Named:
    """Of stages 1 and 2."""
    found: Named = {}
    gaps = optimizer[0].get("param_alignment_paddings")
    for number, group in enumerate(shapes):
        vectors = {WEIGHTS: [state[_SHARE][number] for state in optimizer]}
        vectors |= _moments([s["base_optimizer_state"]["state"][number] for s in optimizer])
        between = gaps[number] if gaps else [0] * len(group)
        if len(between) != len(group):
            raise CheckpointFormatError(f"{where} has gaps for other parameters")
        for key, parts in vectors.items():
            at = 0
            for (name, shape), gap in zip(group.items(), between, strict=True):
                end = at + shape.numel()
                found.setdefault(key, {})[name] = _joined(
                    name, list(_windows(parts, at, end)), shape, where
                )
                at = end + gap
        total = sum(part.numel() for part in vectors[WEIGHTS])
        # the vector is padded to twice as many elements as there are ranks
        grain = 2 * len(optimizer)
        _check_used(-(-at // grain), -(-total // grain), where)
    return found


def _of_shared_parameters(
    optimizer: Sequence[Mapping[str, Any]], shapes: list[dict[str, torch.Size]], where: str
) -> Named:
    """Of stage 3, whose ranks have one flat vector in several pieces."""
    pieces: dict[str, list[list[torch.Tensor]]] = {WEIGHTS: [s[_FLAT] for s in optimizer]}
    for state in optimizer:
        inner = state["optimizer_state_dict"]["state"]
        for key in _moments([inner[n] for n in sorted(inner)][:1]):
            pieces.setdefault(key, []).append([inner[n][key] for n in sorted(inner)])
    found: Named = {key: {} for key in pieces}
    at = 0
    for name, shape in ((n, s) for group in shapes for n, s in group.items()):
        share = math.ceil(shape.numel() / len(optimizer))
        for key, by_rank in pieces.items():
            parts = [part for of in by_rank for part in _windows(of, at, at + share)]
            found[key][name] = _joined(name, parts, shape, where)
        at += share
    for parts in pieces[WEIGHTS]:
        _check_used(at, sum(part.numel() for part in parts), where)
    return found


def _check_used(used: int, there: int, where: str) -> None:
    """Raises where the flat vectors are longer than the parameters that they are said to hold."""
    if used != there:
        raise CheckpointFormatError(
            f"{where} has another layout: of {there} (parts of) elements, its parameters are {used}"
        )


def _moments(states: Sequence[Mapping[str, Any]]) -> dict[str, list[torch.Tensor]]:
    """Of what an optimizer keeps for a flat vector, the vectors of its length, by rank."""
    keys = [k for k, x in states[0].items() if isinstance(x, torch.Tensor) and x.dim() == 1]
    return {str(key): [state[key] for state in states] for key in keys}


def _windows(parts: Sequence[torch.Tensor], begin: int, end: int) -> Iterator[torch.Tensor]:
    """The pieces of a vector, which is in several, from one element to another."""
    at = 0
    for part in parts:
        low, high = max(begin - at, 0), min(end - at, part.numel())
        if low < high:
            yield part.reshape(-1)[low:high]
        at += part.numel()


def _joined(name: str, parts: list[torch.Tensor], shape: torch.Size, where: str) -> StoredTensor:
    """A parameter from its pieces in order; behind its end may be padding."""
    if not parts and not shape.numel():
        return StoredTensor(tuple(shape), torch.float32, lambda: torch.empty(shape))
    if sum(part.numel() for part in parts) < shape.numel():
        raise CheckpointFormatError(
            f"{where} has {sum(part.numel() for part in parts)} elements of {name}, which has "
            f"{shape.numel()}"
        )
    stored = [held(part, f"{where}: {name}") for part in parts]
    if len({part.dtype for part in stored}) > 1:
        raise CheckpointFormatError(f"{where} has {name} in parts of several dtypes")

    def read() -> torch.Tensor:
        flat = torch.cat([part.read().reshape(-1) for part in stored])
        return flat[: shape.numel()].reshape(shape).clone()

    return StoredTensor(tuple(shape), parts[0].dtype, read)


def _universal(folder: Path, shapes: Mapping[str, torch.Size]) -> Named:
    """A folder for each parameter, a file for its weights and each moment."""
    found: Named = {}
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            continue
        for file in sorted(path.glob("*.pt")):
            key = WEIGHTS if file.stem == "fp32" else file.stem
            if key == "step":
                continue
            value = load_torch_file(file)
            tensor = value.get("param") if isinstance(value, Mapping) else value
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointFormatError(f"{file} holds no tensor")
            # of stage 3 they are flat
            shape = shapes.get(path.name, tensor.shape)
            found.setdefault(key, {})[path.name] = _joined(path.name, [tensor], shape, str(file))
    return found
