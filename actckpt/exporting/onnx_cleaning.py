"""An ONNX file without the paths that torch's exporter writes into it, and with plain names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from actckpt.errors import WeightsExportError

_AXES = ("batch", "sequence")
# of a line of a stack trace
_TRACE = b'File "'


def cleaned(path: str, outputs: list[str], inputs: list[str]) -> None:
    """Rewrites a file without stack traces (hundreds of absolute paths) and exporter's notes.

    Args:
        outputs: names for the outputs, one for each; else they keep the exporter's.
        inputs: those of the inputs, of which the first names the dimensions.

    Raises:
        WeightsExportError: a path is left.
    """
    import onnx

    model: Any = onnx.load(path, load_external_data=False)
    for part in _parts(model):
        if hasattr(part, "metadata_props"):
            del part.metadata_props[:]
        part.doc_string = ""
    del model.graph.value_info[:]
    _name_outputs(model.graph, outputs)
    _name_dimensions(model.graph, inputs)
    raw = model.SerializeToString()
    if _TRACE in raw:
        raise WeightsExportError("the ONNX file would carry paths of this machine's sources")
    os.unlink(path)
    with open(path, "xb") as file:
        file.write(raw)
    # with its external data
    onnx.checker.check_model(path)


def _parts(model: Any) -> Iterator[Any]:
    yield model
    for function in model.functions:
        yield function
        yield from _nodes(function.node)
    yield from _graph(model.graph)


def _graph(graph: Any) -> Iterator[Any]:
    yield graph
    yield from graph.initializer
    yield from (*graph.input, *graph.output, *graph.value_info)
    yield from _nodes(graph.node)


def _nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graph(inner)


def _name_outputs(graph: Any, names: list[str]) -> None:
    fixed = {value.name for value in (*graph.input, *graph.initializer)}
    names = [f"{name}_output" if name in fixed else name for name in names]
    before = [output.name for output in graph.output]
    if len(names) != len(before) or len(set(names)) != len(names):
        return  # which is which cannot be told
    made = {name for node in graph.node for name in node.output}
    # those of branches and loops, which read values from outside, too
    nodes = [part for part in _nodes(graph.node) if hasattr(part, "op_type")]
    if {name for node in nodes for name in node.output if name not in made} & set(names):
        return
    new: dict[str, str] = {}
    again = []
    for output, name in zip(graph.output, names, strict=True):
        if output.name in new or output.name in fixed:
            # the same tensor once more, or one that is given
            again.append((output.name, name))
        else:
            new[output.name] = name
        output.name = name
    for name in (set(names) & made) - new.keys():
        # of a value on the way, which the exporter has called so
        inner = f"{name}_inner"
        while inner in made | fixed | set(names):
            inner += "_"
        new[name] = inner
    for node in nodes:
        for places in (node.input, node.output):
            for n, place in enumerate(places):
                places[n] = new.get(place, place)
    for same, name in again:
        graph.node.add(op_type="Identity", input=[new.get(same, same)], output=[name])


def _name_dimensions(graph: Any, inputs: list[str]) -> None:
    """``batch`` and ``sequence`` for the first input's symbols; others' with the input's name."""
    known: dict[str, str] = {}
    for value in graph.input:
        for axis, dimension in zip(_AXES, value.type.tensor_type.shape.dim, strict=False):
            if dimension.dim_param:
                name = axis if value.name == inputs[0] else f"{value.name}_{axis}"
                known.setdefault(dimension.dim_param, name)
    for value in (*graph.input, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in known:
                dimension.dim_param = known[dimension.dim_param]
