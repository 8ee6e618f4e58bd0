"""Results as they were kept: what they depend on, and their rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from experiments.results import FOLDER

Row = dict[str, Any]

MODELS = {
    "gpt2": "GPT-2",
    "llama": "Llama",
    "bert": "BERT",
    "vit": "ViT",
    "t5": "T5",
    "mixtral": "Mixtral",
    "resnet50": "ResNet-50",
    "densenet121": "DenseNet-121",
    "unet": "U-Net",
}


# of many layers, on which only eager checkpointing was measured
DEEP = {
    "gpt2_36": "GPT-2, 36",
    "llama_32": "Llama, 32",
    "vit_24": "ViT, 24",
    "t5_12": "T5, 12+12",
    "resnet_101": "ResNet-101",
}


@dataclass(frozen=True)
class Kept:
    """The rows of one results file, and the circumstances in its first line."""

    name: str
    about: Row
    rows: tuple[Row, ...]

    @property
    def source(self) -> str:
        """The sentence that every table ends in: command, hardware, and where all of it is."""
        return (
            f"`{self.about['command']}`, on {self.about['hardware']}. "
            f"[All figures](../experiments/results/{self.name}.md)"
        )


def kept(name: str) -> Kept:
    """The results of that name."""
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    first, *rows = map(json.loads, lines)
    return Kept(name, first["about"], tuple(rows))


def mean(ratios: Sequence[float]) -> str:
    """The geometric mean of ratios, as a cell."""
    return f"{geometric_mean(ratios):.2f}"


def between(values: Sequence[float], digits: int = 1) -> str:
    """The least and the largest, as "0.1 to 0.7"."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
