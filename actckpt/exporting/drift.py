"""The one check of every conversion: weights turned back bit for bit, then what consumers compute.

With weights as a model begins with, a wrong file is hardly to be told from a right one: a GGUF file
without the rotary permutation differs by a hundredth and has every top token right. So outputs are
compared on weights scaled up.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actckpt.errors import ArgumentError, WeightsExportError
from actckpt.exporting.export import FORMATS, export
from actckpt.exporting.outputs import Inputs, Run, deviation, first_output
from actckpt.exporting.replica import replica_of
from actckpt.exporting.source import source_of_module
from actckpt.exporting.unwrapping import unwrapped_model

# what scaling leaves finite and makes every attention sharp
FACTOR = 8.0


@dataclass(frozen=True, slots=True)
class Drift:
    """How far what a consumer computes is from what the model does.

    Args:
        format: of the export.
        deviations: for each of the inputs the largest deviation of an output, as a share of the
            largest output.
        tolerance: what they may be.
    """

    format: str
    deviations: tuple[float, ...]
    tolerance: float


def check_drift(
    model: nn.Module,
    format: str,
    inputs: Sequence[Inputs],
    *,
    tolerance: float,
    factor: float = FACTOR,
    **options: Any,
) -> Drift:
    """What came of exporting a copy of a model with its weights scaled up, and of running it.

    Where a format rounds weights, what it computes is compared with a model of the rounded ones.

    Args:
        inputs: two at least, of different shapes, by argument.
        tolerance: of the deviations; 0 asks for the same bits.
        factor: by which matrices are multiplied.
        options: arguments of `export` for the format.

    Raises:
        ArgumentError: the inputs are of one shape, or the format has no consumer here.
        WeightsExportError: the export failed, as it does where weights do not turn back bit for
            bit, or a deviation is above the tolerance.
    """
    shapes = {tuple(sorted((k, tuple(v.shape)) for k, v in given.items())) for given in inputs}
    if len(shapes) < 2:
        raise ArgumentError("inputs must be of two shapes at least: a fixed one would not show")
    bare = unwrapped_model(model)
    # where its consumers run
    scaled = replica_of(source_of_module(bare, type(bare).__name__), own_memory=True).cpu()
    with torch.no_grad():
        for parameter in scaled.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    module = importlib.import_module(f"actckpt.exporting.{FORMATS[format][0]}")
    deviations = []
    with tempfile.TemporaryDirectory() as place:
        done = export(scaled, Path(place) / "out", format=format, **options)
        run: Run = module.consumer(done.path, scaled)
        # what a format rounds is no fault of the conversion
        model = module.rounded(done.path, scaled) if hasattr(module, "rounded") else scaled
        for given in ({name: x.cpu() for name, x in each.items()} for each in inputs):
            with torch.no_grad():
                wanted = first_output(model(**given))
            deviations.append(deviation(run(given), wanted))
    found = Drift(format, tuple(deviations), tolerance)
    if not all(x <= tolerance for x in deviations):
        raise WeightsExportError(
            f"{format}: outputs deviate by {max(deviations):.2g} of the largest, {tolerance:g} is "
            "the tolerance: the conversion is wrong for this model, or its consumer computes it "
            "otherwise"
        )
    return found
