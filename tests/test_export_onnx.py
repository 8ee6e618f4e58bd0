"""ONNX models: run by ONNX Runtime at other shapes, with the model's names and nobody's paths."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

import actckpt
from actckpt.checkpoint.files import Files
from actckpt.errors import ArgumentError, CheckpointFormatError, WeightsExportError
from actckpt.exporting import onnx_cleaning, onnx_file
from actckpt.exporting.drift import check_drift
from actckpt.exporting.folder import verify_folder
from actckpt.exporting.outputs import deviation, flattened
from tests.travelling import TRAVELLERS, VOCABULARY, llama

onnx = pytest.importorskip("onnx", reason="pip install 'actckpt[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'actckpt[onnx]'")
ort = pytest.importorskip("onnxruntime", reason="pip install 'actckpt[onnx]'")

# of ONNX Runtime's kernels, of weights scaled up
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_other_shapes_on_weights_scaled_up(name: str) -> None:
    traveller = TRAVELLERS[name]
    sample = traveller.inputs[0]
    check_drift(traveller(), "onnx", traveller.inputs, tolerance=TOLERANCE, example=sample)


def test_a_planned_model_in_training(tmp_path: Path) -> None:
    traveller = TRAVELLERS["gpt2"]
    model: Any = actckpt.optimize(traveller(), None, policy="full")
    given = traveller.inputs[0]
    model(**given, labels=given["input_ids"]).loss.backward()
    plan = actckpt.report(model).plan
    done = actckpt.export(model, tmp_path / "out", format="onnx")
    assert model.training
    assert model.config.use_cache
    assert actckpt.report(model).plan == plan

    read = onnx.load(done.path / "model.onnx", load_external_data=False).graph
    (tokens,), (logits,) = read.input, read.output
    assert [d.dim_param for d in tokens.type.tensor_type.shape.dim] == ["batch", "sequence"]
    assert (logits.name, logits.type.tensor_type.shape.dim[2].dim_value) == ("logits", VOCABULARY)
    # tied weights once, and every name the model's own
    names = {i.name for i in read.initializer}
    assert names < set(model.state_dict())
    assert len(names & {"transformer.wte.weight", "lm_head.weight"}) == 1
    weights = sum(p.nbytes for p in model.parameters())
    assert done.files["model.onnx.data"] <= weights + 4096

    raw = (done.path / "model.onnx").read_bytes()
    for path in (os.path.dirname(torch.__file__), os.getcwd(), str(tmp_path), "site-packages"):
        assert path.encode() not in raw
    session = ort.InferenceSession(done.path / "model.onnx", providers=["CPUExecutionProvider"])
    plain = actckpt.revert(model)
    for inputs, wanted in zip(traveller.inputs, traveller.outputs(plain), strict=True):
        (found,) = session.run(None, {k: v.numpy() for k, v in inputs.items()})
        assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-5)

    # the checker misses a turned bit in external data, the manifest does not
    data = done.path / "model.onnx.data"
    *rest, last = data.read_bytes()
    data.write_bytes(bytes([*rest, last ^ 1]))
    onnx.checker.check_model(done.path / "model.onnx")
    with pytest.raises(CheckpointFormatError, match=r"model\.onnx\.data is damaged"):
        verify_folder(Files(), str(done.path))


def test_dropout_and_batch_norm_are_those_of_evaluation(tmp_path: Path) -> None:
    """In training mode the exporter keeps dropout at work, and warns."""
    traveller = TRAVELLERS["own"]
    sample = dict(traveller.inputs[0])
    done = actckpt.export(traveller(), tmp_path / "out", format="onnx", example=sample)
    operations = {n.op_type for n in onnx.load(done.path / "model.onnx").graph.node}
    assert "BatchNormalization" in operations
    assert "Dropout" not in operations


def test_what_does_not_run_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", None)  # nothing comes so far
    one = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    cases: tuple[tuple[Any, Any, type[Exception], str], ...] = (
        (llama().bfloat16(), None, WeightsExportError, "as bfloat16, which ONNX Runtime cannot"),
        (llama(), one, ArgumentError, r"of shape \[1, 4\]: of one row or token"),
        (TRAVELLERS["own"](), None, ArgumentError, "is traced with a sample of its inputs"),
        (llama(), [1], ArgumentError, "example must be the tensors of one call"),
    )
    for model, example, kind, message in cases:
        with pytest.raises(kind, match=message):
            actckpt.export(model, tmp_path / "out", format="onnx", example=example)
    assert os.listdir(tmp_path) == []
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(WeightsExportError, match=r"pip install 'actckpt\[onnx\]'"):
        actckpt.export(llama(), tmp_path / "out", format="onnx")


def test_a_wrong_file_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = onnx_cleaning.cleaned

    def negated(path: str, *more: Any) -> None:
        clean(path, *more)
        model = onnx.load(path)
        model.graph.node[-1].op_type = "Sub"
        onnx.save(model, path)

    def damaged(path: str, *more: Any) -> None:
        clean(path, *more)
        model = onnx.load(path)
        weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
        weight[0] += 1
        name = model.graph.initializer[0].name
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, name))
        onnx.save(model, path)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.shift

    class Branching(Shifted):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.shift if float(x.sum()) > 0 else x

    sample = {"x": torch.ones(2, 3)}
    with pytest.raises(WeightsExportError, match="makes no ONNX model of Branching: "):
        actckpt.export(Branching(), tmp_path / "out", format="onnx", example=sample)
    for broken, message in ((negated, "ONNX Runtime deviates by"), (damaged, "shift did not read")):
        monkeypatch.setattr(onnx_file, "cleaned", broken)
        with pytest.raises(WeightsExportError, match=message):
            actckpt.export(Shifted(), tmp_path / "out", format="onnx", example=sample)
        assert os.listdir(tmp_path) == []


class Shift(nn.Module):
    def __init__(self, give: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(3))
        self.give = give

    def forward(self, x: torch.Tensor) -> Any:
        return self.give(x + self.shift)


@dataclass
class Several(ModelOutput):  # type: ignore[misc]
    """An output of transformers' kind."""

    logits: Any = None
    hidden: Any = None
    memory: Any = None


OUTPUTS: dict[str, tuple[Callable[[torch.Tensor], Any], list[str]]] = {
    "several": (
        lambda y: Several(logits=y, hidden=(2 * y, 3 * y), memory=7 * y),
        ["logits", "hidden_0", "hidden_1", "memory"],
    ),
    "a plain dict": (lambda y: {"z": y, "a": (2 * y, [3 * y])}, ["z", "a_0", "a_1_0"]),
    # as the exporter calls values on the way, a parameter and the input
    "names that are taken": (
        lambda y: {"mul_1": y, "mul_1_inner": 2 * y, "shift": (y * 3).exp(), "x": y - 1},
        ["mul_1", "mul_1_inner", "shift_output", "x_output"],
    ),
    "a tuple": (lambda y: (y, (2 * y, y)), ["output_0", "output_1_0", "output_1_1"]),
    "zeros and infinities": (
        lambda y: {"zeros": y * 0, "masked": torch.where(y > 1.5, y, -torch.inf)},
        ["zeros", "masked"],
    ),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_output_has_its_own_name(kind: str, tmp_path: Path) -> None:
    give, names = OUTPUTS[kind]
    model = Shift(give)
    sample = {"x": torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.5, 0.25]])}
    done = actckpt.export(model, tmp_path / "out", format="onnx", example=sample)
    session = ort.InferenceSession(done.path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == names
    wanted = [x for _, x in flattened(model(**sample))]
    found = session.run(None, {"x": sample["x"].numpy()})
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(torch.from_numpy(one), other.detach(), rtol=1e-6)


def test_a_fault_of_any_output_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = onnx_cleaning.cleaned

    def exchanged(path: str, names: list[str], *more: Any) -> None:
        clean(path, names, *more)
        model = onnx.load(path)
        model.graph.output[1].name, model.graph.output[2].name = names[2], names[1]
        onnx.save(model, path)

    monkeypatch.setattr(onnx_file, "cleaned", exchanged)
    sample = {"x": torch.ones(2, 3)}
    model = Shift(lambda y: Several(logits=y, hidden=2 * y, memory=3 * y))
    with pytest.raises(WeightsExportError, match="of output memory"):
        actckpt.export(model, tmp_path / "out", format="onnx", example=sample)
    with pytest.raises(WeightsExportError, match="gives no tensor but NoneType"):
        actckpt.export(Shift(lambda y: None), tmp_path / "out", format="onnx", example=sample)
    assert os.listdir(tmp_path) == []


def test_deviations() -> None:
    zeros, masked = torch.zeros(2), torch.tensor([1.0, -torch.inf])
    assert deviation(zeros, zeros) == deviation(masked, masked) == 0
    assert deviation(zeros + 0.5, zeros) == 0.5
    assert deviation(masked * 2, masked) == 1
    assert deviation(torch.tensor([1.0, 0.0]), masked) == torch.inf
    assert not deviation(masked + torch.nan, masked) <= 1
    assert deviation(zeros[:0], zeros[:0]) == 0


def test_the_other_shape_that_is_tried() -> None:
    assert onnx_file._other({"x": torch.zeros(2, 2, dtype=torch.int64)})["x"].shape == (3, 3)
    assert onnx_file._other({"x": torch.zeros(2, 5, dtype=torch.int64)})["x"].shape == (3, 4)
    assert onnx_file._other({"x": torch.zeros(2, 3, 8, 8)})["x"].shape == (3, 3, 8, 8)
