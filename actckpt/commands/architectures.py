"""The model that an exported checkpoint is of, and a folder of Hugging Face's as a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actckpt.checkpoint.dtypes import name_of
from actckpt.commands.targets import load_target
from actckpt.errors import TargetError
from actckpt.foreign.stored import StoredTensor
from actckpt.importing.huggingface import INDEX, read_any, read_indexed, weights_file
from actckpt.importing.naming import is_ignored

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
# which transformers no longer keeps, and older files have
_COMPUTED = ("rotary_emb.inv_freq", "position_ids")
# of what from_pretrained tells
_DISAGREEING = {
    "missing_keys": "lacks",
    "unexpected_keys": "has besides",
    "mismatched_keys": "has in another shape",
}


def architecture(target: str) -> tuple[nn.Module, dict[str, torch.Tensor] | None]:
    """A model whose weights do not count, and a sample of its inputs if one is known.

    Args:
        target: ``module:function``, a model type, or a folder with a ``config.json``.

    Raises:
        TargetError: it is none of these.
    """
    if (Path(target) / CONFIG).exists():
        config, kind = _kind(Path(target))
        return kind(config), None
    model, batch = load_target(target, overrides={}, batch_size=2, seq_len=8, dtype=None)
    if not isinstance(batch, Mapping):
        return model, None
    tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "labels"}
    return model, tensors


def pretrained(folder: Path) -> nn.Module:
    """The model of a folder that ``save_pretrained`` has written, in the dtype it is kept in.

    Raises:
        TargetError: it is none, transformers has no such class, or the files lack a weight of it,
            have another, or one of another shape.
        CheckpointError: the files are damaged, or of no format that is read.
    """
    if not (folder / CONFIG).exists():
        raise TargetError(
            f"{folder} has no {CONFIG}: give a folder in the layout of Hugging Face, or export a "
            "checkpoint by actckpt checkpoint export"
        )
    _, kind = _kind(folder)
    # before transformers, whose errors about them are no one line
    stored = _stored(folder)
    model: nn.Module
    with torch.random.fork_rng(devices=[]):
        model, told = kind.from_pretrained(
            folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    # from_pretrained makes up what is missing, and warns
    for key, what in _DISAGREEING.items():
        if names := sorted(str(each) for each in told[key]):
            raise TargetError(
                f"{folder} {what} {names[0]} ({len(names)} in all), by its {CONFIG} a "
                f"{kind.__name__}: complete the folder, or name the class in {CONFIG} that it is of"
            )
    _as_kept(model, stored, folder)
    return model


def _stored(folder: Path) -> dict[str, StoredTensor]:
    file = weights_file(folder)
    if file is None:
        raise TargetError(
            f"{folder} has a {CONFIG} and no weights beside it: put model.safetensors or "
            "pytorch_model.bin there, or its parts with their index"
        )
    try:
        return read_indexed(file) if file.name.endswith(INDEX) else read_any(file)
    except OSError as error:
        raise TargetError(f"{file} cannot be read: {error}") from error


def _as_kept(model: nn.Module, stored: Mapping[str, StoredTensor], folder: Path) -> None:
    """Gives weights back the dtype that the files have them in; transformers makes them all one.

    Raises:
        TargetError: it is another than the model's, and of a weight that is called otherwise there.
    """
    live = model.state_dict(keep_vars=True)
    dtypes = {x.dtype for x in live.values()}
    for name, tensor in stored.items():
        if name.endswith(_COMPUTED):
            continue
        if name in live:
            if live[name].dtype != tensor.dtype:
                live[name].data = tensor.read()
        elif tensor.dtype not in dtypes and not is_ignored(name, model):
            raise TargetError(
                f"{folder} has {name} as {name_of(tensor.dtype)}, which {type(model).__name__} "
                "calls otherwise and has in another dtype: load the folder and export the model"
            )


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in a folder; None where there is none."""
    if not (folder / TOKENIZER).exists():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _kind(folder: Path) -> tuple[Any, Any]:
    """(configuration, class) of a folder."""
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            f"{folder} is in the layout of Hugging Face: pip install 'actckpt[hf]' ({error})"
        ) from error
    config = transformers.AutoConfig.from_pretrained(folder)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise TargetError(
            f"{folder}/{CONFIG} names no class of transformers ({', '.join(names) or 'none'}): "
            "name your own model as module:function"
        )
    return config, kind
