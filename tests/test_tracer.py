"""The trace is what a real step does, and nothing is left of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import actckpt
from actckpt.data.graph import Category, Graph
from actckpt.errors import TraceError
from actckpt.tracing.call import tensors
from actckpt.tracing.fx_graph import fx_graph
from actckpt.tracing.mode import SKIPPED, flat_outputs
from actckpt.tracing.tracer import trace_step
from tests.predictions import autocast, case_step, prepared
from tests.suite import CASES, Case, call, loss_of, trainable

each_case = pytest.mark.parametrize("name", CASES)


class Listed(TorchDispatchMode):
    """The operations of a real step and its results' strides, without autograd's bookkeeping."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[str] = []
        self.made: set[int] = set()  # storages of results

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in SKIPPED and func.namespace not in ("prim", "profiler"):
            strides = [t.stride() for t in flat_outputs(out) if t.layout == torch.strided]
            self.ops.append(f"{func} {strides}")
        self.made.update(t.untyped_storage()._cdata for t in flat_outputs(out))
        return out


@dataclass(frozen=True)
class Real:
    """What a real forward and backward did: operations, and bytes saved for backward."""

    ops: list[str]
    saved_bytes: int


def real(case: Case, model: nn.Module) -> Real:
    """One forward, loss and backward, as a user writes them."""
    batch = case.batch()
    model.zero_grad(set_to_none=True)
    if case.micro_steps > 1:  # planned for with resident gradients
        for p in trainable(model):
            p.grad = torch.zeros_like(p)
    resident = (*model.parameters(), *model.buffers(), *tensors(batch))
    held = {t.untyped_storage()._cdata for t in resident}
    saved: dict[int, torch.UntypedStorage] = {}
    mode = Listed()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata in mode.made - held:
            saved[storage._cdata] = storage  # kept, so that no other takes its place
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), mode:
        with autocast(case):
            output = call(model, batch)
            loss = loss_of(case, output)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return Real(mode.ops, sum(s.nbytes() for s in saved.values()))


def traced(case: Case, model: nn.Module) -> Graph:
    """The trace of the same, without an optimizer."""
    with autocast(case):
        return trace_step(model, case_step(case, case.batch(), None))


def listed(graph: Graph) -> list[str]:
    """Its operations, as `Listed` has a real step's."""
    strides = [v.stride for v in graph.values]
    return [f"{op.name} {[strides[v] for v in op.outputs]}" for op in graph.ops]


def saved_bytes(graph: Graph) -> int:
    """Bytes of the distinct storages that autograd saves, residents apart."""
    storages = {graph.values[s.value].storage for s in graph.saves if not s.held}
    return sum(graph.storages[s].bytes for s in storages)


def difference(a: list[str], b: list[str]) -> str:
    """Where two lists of operations part, "" if nowhere."""
    for i, (x, y) in enumerate(itertools.zip_longest(a, b)):
        if x != y:
            around = slice(max(0, i - 3), i + 3)
            return f"operation {i} of {len(a)} and {len(b)}: {a[around]}, {b[around]}"
    return ""


def variant(case: Case, dropout: float, cast: bool) -> Case:
    """The case with every dropout of its model at the same rate, and autocast on or off."""

    def build() -> nn.Module:
        model = case.build()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            elif isinstance(module, nn.LSTM) or "attention" in type(module).__name__.lower():
                for name in ("dropout", "attention_dropout", "dropout_p"):
                    if isinstance(getattr(module, name, None), float):
                        setattr(module, name, dropout)
        return model

    return dataclasses.replace(case, build=build, autocast=cast)


@pytest.mark.parametrize("on", [False, True], ids=["plain", "dropout and autocast"])
@each_case
def test_trace_lists_the_operations_and_saves_of_a_real_step(name: str, on: bool) -> None:
    # a model in bfloat16 has nothing to cast
    cast = on and CASES[name].autocast == ("bf16" in CASES[name].tags)
    if name == "lstm" and cast and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch itself runs no LSTM in bfloat16 on this CPU")
    case = variant(CASES[name], 0.1 if on else 0.0, cast)
    model = case.build()
    graph, run = traced(case, model), real(case, model)
    assert not difference(listed(graph), run.ops)
    assert saved_bytes(graph) == run.saved_bytes


class Pyramid(nn.Module):
    """A pooled image is contiguous and channels last at once; what becomes of it is resized."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.pooled = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.norm, self.last = nn.LayerNorm(16), nn.Conv2d(16, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.stem(x)
        pooled = nn.functional.interpolate(self.pooled(stem), stem.shape[2:], mode="bilinear")
        both = torch.cat([stem * self.gate(stem), pooled], dim=1)
        normed = self.norm(both.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: torch.Tensor = self.last(normed).square().mean()
        return out


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("count", [2, 5])
def test_images_are_laid_out_as_they_are(count: int, layout: torch.memory_format) -> None:
    model = Pyramid()
    model.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(count, 3, 16, 16).contiguous(memory_format=layout)
    graph = actckpt.trace(model, x)
    with Listed() as mode:
        model(x)
    assert not difference(listed(graph)[: graph.forward_end], mode.ops)


def everything(model: nn.Module) -> dict[str, Any]:
    """What a trace must leave alone."""
    found: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
    }
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            inside = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else None
            found[f"{path}.{key}"] = (id(value), inside)
    for path, p in model.named_parameters():
        found[f"gradient of {path}"] = None if p.grad is None else (id(p.grad), p.grad._version)
        found[f"version of {path}"] = p._version
    for path, b in model.named_buffers():
        found[f"version of {path}"] = b._version
    return found


@each_case
def test_trace_leaves_no_trace(name: str) -> None:
    case = CASES[name]
    model = case.build()
    for p in itertools.islice(trainable(model), 3):
        p.grad = torch.ones_like(p)
    before = everything(model)
    traced(case, model)
    after = everything(model)
    assert [k for k in before if before[k] != after.get(k)] == []
    assert before.keys() == after.keys()


class CachesMask(nn.Module):
    """Keeps what the first forward made in a plain attribute, a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mask: torch.Tensor | None = None
        self.seen: list[torch.Tensor] = []
        self.by_length: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            self.mask = torch.ones(x.shape[-1])
            self.seen.append(self.mask)
            self.by_length[x.shape[-1]] = self.mask
        total: torch.Tensor = (self.linear(x) * self.mask).sum()
        return total


def test_a_mask_cached_while_tracing_is_no_fake_tensor_afterwards() -> None:
    model, x = CachesMask(), torch.ones(2, 4)
    actckpt.trace(model, x)
    assert model.mask is None
    assert not model.seen
    assert not model.by_length
    model(x).backward()


class ReadOnly(OrderedDict[str, Any]):
    """A mapping that refuses to be changed, as the configs of diffusers' models."""

    frozen = False

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("it is read-only")

    clear = update = pop = setdefault = _refuse

    def __setitem__(self, key: str, value: Any) -> None:
        if self.frozen:
            self._refuse()
        super().__setitem__(key, value)


def test_read_only_containers_are_let_alone() -> None:
    class Configured(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.config = ReadOnly()
            self.config["width"], self.config["scale"] = 4, torch.tensor(0.5)
            self.config.frozen = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(x) * self.config["scale"]
            return out

    model = Configured()
    before = dict(model.config)
    actckpt.trace(model, torch.ones(2, 4), loss_fn=lambda out: out.sum())
    assert all(model.config[key] is value for key, value in before.items())
    assert type(model.config) is ReadOnly
    assert list(model.config) == list(before)


@each_case
def test_graph_reads_back(name: str) -> None:
    graph = prepared(name).graph
    assert Graph.from_json(json.dumps(graph.to_json())) == graph


class NumbersOfData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.sum() * y.mean().item()


class ShapesByData(NumbersOfData):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y[y > 0].sum()


class Steps(nn.Module):
    """Counts its calls in a list of buffers, and asks for the number through a view."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._foreach_add_([self.steps], 1.0)
        return x * self.steps.view(1).item()


def test_what_wrote_a_number_that_is_asked_for_is_marked() -> None:
    x = torch.ones(3, requires_grad=True)
    graph = actckpt.trace(Steps(), x, loss_fn=lambda out: out.sum())
    assert [op.name for op in graph.ops if op.asked] == ["aten._foreach_add_.Scalar"]


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (NumbersOfData, "return y.sum() * y.mean().item()"),
        (ShapesByData, "return y[y > 0].sum()"),
    ],
)
def test_a_forward_that_depends_on_data_is_named_by_its_line(
    kind: type[nn.Module], line: str
) -> None:
    model, x = kind(), torch.ones(2, 8)
    before = everything(model)
    with pytest.raises(TraceError) as raised:
        actckpt.trace(model, x)
    assert line in str(raised.value)
    assert __file__ in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 10
    assert everything(model) == before


@each_case
def test_fx_graph_is_sound_and_holds_every_operation(name: str) -> None:
    graph = prepared(name).graph
    exported = fx_graph(graph)
    exported.lint()
    calls = [n for n in exported.nodes if n.op == "call_function" and "signature" in n.meta]
    made = [n for n in calls if isinstance(n.target, torch._ops.OpOverload)]
    assert [str(n.target) for n in made] == [op.name for op in graph.ops]
    assert [n.meta["phase"] for n in made] == [str(op.phase) for op in graph.ops]
    stages = [graph.stages[op.stage].path if op.stage >= 0 else "" for op in graph.ops]
    assert [n.meta["stage"] for n in made] == stages


# deterministic, and without a loss that closes over tensors
@pytest.mark.parametrize("name", ["mlp64", "gpt2", "resnet", "vit"])
def test_running_the_fx_graph_gives_the_loss_and_the_gradients(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.batch()
    graph = traced(case, model)
    exported = fx_graph(graph)
    arguments = inputs(graph, exported, model, batch)
    with torch.no_grad():
        found = torch.fx.Interpreter(torch.fx.GraphModule(nn.Module(), exported)).run(*arguments)
    names = next(n for n in exported.nodes if n.op == "output").meta["gradients"]
    loss = loss_of(case, call(model, batch))
    loss.backward()
    assert torch.equal(found[0], loss)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(names) == set(expected)
    different = [n for n, g in zip(names, found[1:], strict=True) if not g.equal(expected[n])]
    assert not different


def inputs(
    graph: Graph, exported: torch.fx.Graph, model: nn.Module, batch: Any
) -> list[torch.Tensor]:
    """Copies of the tensors that an exported graph's placeholders stand for."""
    named = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    data = iter(tensors(batch))
    of_batch = {i: next(data) for i, s in enumerate(graph.storages) if s.category is Category.BATCH}
    copies: dict[int, torch.Tensor] = {}
    found = []
    for node in exported.nodes:
        if node.op != "placeholder":
            continue
        sid = node.meta["val"].storage
        if sid not in copies:
            storage = graph.storages[sid]
            if sid in of_batch:
                source = of_batch[sid]
            else:
                source = named[storage.name] if storage.name else torch.empty(storage.bytes)
            assert storage.name or sid in of_batch or not storage.bytes
            copies[sid] = source.detach().clone()
        value = node.meta["val"]
        found.append(copies[sid].as_strided(value.shape, value.stride, value.offset))
    return found
