"""An ONNX model, ``model.onnx`` with ``model.onnx.data`` beside it: what ONNX Runtime runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actckpt.checkpoint.dtypes import name_of
from actckpt.errors import ArgumentError, WeightsExportError
from actckpt.exporting.folder import Folder
from actckpt.exporting.merging import merged
from actckpt.exporting.onnx_cleaning import cleaned
from actckpt.exporting.outputs import Inputs, Run, deviation, first_output, flattened
from actckpt.exporting.prepared import Asked, Prepared, library
from actckpt.exporting.replica import replica_of
from actckpt.exporting.source import Source
from actckpt.exporting.weights import same_bits

NAME = "model.onnx"
# what ONNX Runtime's own kernels deviate by, as a share of the largest output
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2}


def prepare(source: Source, asked: Asked) -> Prepared:
    """The model in evaluation mode, rows and tokens of its inputs of any number.

    Raises:
        ArgumentError: the sample is none of which two sizes of each dimension can be told.
        WeightsExportError: a library is missing, or ONNX Runtime runs no such weights.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        library(name, "onnx", "an ONNX model")
    source = merged(source, untie=bool(asked.untie))
    dtype = _dtype(source)
    # traced and run where ONNX Runtime is
    model = replica_of(source).cpu()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        # a cache among the outputs does not export
        if getattr(config, "use_cache", False):
            config.use_cache = False
    sample = _sample(asked.example, model)

    def write(folder: Folder) -> list[str]:
        path = f"{folder.path}/{NAME}"
        with torch.no_grad():
            wanted = model(**sample)
            first_output(wanted)
            _traced(model, sample).save(path, external_data=True)
        cleaned(path, [name for name, _ in flattened(wanted)], list(sample))
        notes = _check_weights(path, source)
        _check_outputs(Path(path), model, sample, TOLERANCE[dtype])
        return notes

    return Prepared(source.table, source.table.size_bytes, write)


def _traced(model: nn.Module, sample: Inputs) -> Any:
    """What torch's exporter makes of one call.

    Raises:
        WeightsExportError: nothing.
    """
    try:
        with _without_its_warnings():
            return torch.onnx.export(
                model,
                kwargs=dict(sample),
                dynamo=True,
                # folded matrices would have other names, and other bits
                optimize=False,
                verbose=False,
                dynamic_shapes={name: _dynamic(x) for name, x in sample.items()},
            )
    except torch.onnx.errors.OnnxExporterError as error:
        why = str(error.__cause__ or error).strip().partition("\n")[0]
        raise WeightsExportError(
            f"torch.onnx.export makes no ONNX model of {type(model).__name__}: {why:.300}. Take "
            "out of its forward what torch.export cannot follow, or export in another format"
        ) from error


def consumer(path: Path, model: nn.Module) -> Run:
    """What runs an exported folder: ONNX Runtime, on the CPU."""
    run_all = _session(path / NAME)

    def run(given: Inputs) -> torch.Tensor:
        return first_output(run_all(given))

    return run


def _session(path: Path) -> Callable[[Inputs], dict[str, torch.Tensor]]:
    """What gives all outputs of a file by name."""
    ort: Any = library("onnxruntime", "onnx", "running an ONNX model")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    names = [output.name for output in session.get_outputs()]

    def run_all(given: Inputs) -> dict[str, torch.Tensor]:
        found = session.run(None, {name: x.numpy() for name, x in given.items()})
        return {n: torch.as_tensor(x) for n, x in zip(names, found, strict=True)}

    return run_all


def _dtype(source: Source) -> torch.dtype:
    """The dtype that outputs are computed in: the coarsest of the weights'."""
    found = torch.float64
    for name, tensor in source.table.persistent().items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if tensor.dtype not in TOLERANCE:
            raise WeightsExportError(
                f"{source.where} has {name} as {name_of(tensor.dtype)}, which ONNX Runtime cannot "
                "run on a CPU: export model.float(), or in another format"
            )
        if tensor.dtype.itemsize < found.itemsize:
            found = tensor.dtype
    return found


def _sample(given: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    if given is None:
        config: Any = getattr(model, "config", None)
        if getattr(model, "main_input_name", "") != "input_ids" or not hasattr(
            config, "vocab_size"
        ):
            raise ArgumentError(
                "an ONNX model is traced with a sample of its inputs: example={name: tensor} with "
                "two rows or more"
            )
        given = {"input_ids": torch.arange(16).reshape(2, 8) % config.vocab_size}
    if not isinstance(given, Mapping) or not all(
        isinstance(x, torch.Tensor) for x in given.values()
    ):
        raise ArgumentError("example must be the tensors of one call, {argument: tensor}")
    for name, x in given.items():
        if any(x.shape[axis] < 2 for axis in _dynamic(x)) or not x.dim():
            raise ArgumentError(
                f"example has {name} of shape {list(x.shape)}: of one row or token, the model "
                "would be for one alone; give two or more"
            )
    return {name: x.cpu() for name, x in given.items()}


def _dynamic(x: torch.Tensor) -> dict[int, Any]:
    """Axes of any size: rows, and tokens of whole numbers."""
    axes = 2 if not x.is_floating_point() and x.dim() > 1 else 1
    return dict.fromkeys(range(min(axes, x.dim())), torch.export.Dim.DYNAMIC)


def _other(sample: Inputs) -> dict[str, torch.Tensor]:
    """Inputs of one more row, and of one token less, or more where there are but two."""
    found = {}
    for name, x in sample.items():
        x = torch.cat([x, x[:1]])
        if 1 in _dynamic(x):
            x = x[:, :-1] if x.shape[1] > 2 else torch.cat([x, x[:, :1]], dim=1)
        found[name] = x
    return found


def _check_weights(path: str, source: Source) -> list[str]:
    """Which weights the file is without; the others it has under their names, bit for bit.

    Raises:
        WeightsExportError: it has not.
    """
    onnx: Any = sys.modules["onnx"]
    found = {
        i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy())
        for i in onnx.load(path).graph.initializer
    }
    unused = []
    groups = [set(group) for group in source.table.tied]
    for name, weight in source.table.weights.items():
        names = next((g for g in groups if name in g), {name}) & found.keys()
        if not names and weight.role == "parameter":
            unused.append(name)
        for there in names:
            if not same_bits(found[there], weight.tensor.cpu()):
                raise WeightsExportError(f"{NAME}: {name} did not read back bit for bit")
    what = "parameters take no part in a call, and are not in the file"
    return [f"{len(unused)} {what}: {', '.join(unused[:3])}"] * bool(unused)


def _check_outputs(path: Path, model: nn.Module, sample: Inputs, tolerance: float) -> None:
    """That ONNX Runtime computes what the model does, of the sample and of another shape.

    Raises:
        WeightsExportError: it does not, or cannot run the file.
    """
    try:
        run_all = _session(path)
        for given in (sample, _other(sample)):
            with torch.no_grad():
                output = model(**given)
            wanted = [x for _, x in flattened(output)]
            found = run_all(given)
            if len(found) != len(wanted):
                # which is which cannot be told, but of the first
                found, wanted = {"first": next(iter(found.values()))}, wanted[:1]
            for (name, x), own in zip(found.items(), wanted, strict=True):
                far = deviation(x, own)
                if not far <= tolerance:
                    shapes = {key: list(value.shape) for key, value in given.items()}
                    raise WeightsExportError(
                        f"ONNX Runtime deviates by {far:.2g} of the largest of output {name}, "
                        f"{tolerance:g} is the tolerance, of inputs of shapes {shapes}"
                    )
    except (RuntimeError, ValueError) as error:
        if isinstance(error, WeightsExportError):
            raise
        raise WeightsExportError(f"ONNX Runtime cannot run what was written: {error}") from error


@contextmanager
def _without_its_warnings() -> Iterator[None]:
    """What torch's exporter warns of in its own code, which no caller can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)
        yield
