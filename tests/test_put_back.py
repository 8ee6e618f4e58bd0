"""What is saved can be put back: quantized weights, wrappers of optimizers; else it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.checkpoint.decoding import decode

SIZE = 64
STOP, STEPS = 3, 6


def run_of(
    directory: Path, model: nn.Module, optimizer: Any, until: int
) -> tuple[dict[str, torch.Tensor], Any]:
    """The trained parameters and outputs after so many steps of the whole run, saved at `STOP`."""
    with actckpt.Checkpointer(
        directory, model=model, optimizer=optimizer, loader=range(STEPS), every=None
    ) as run:
        resumed = run.resume()
        if hasattr(optimizer, "train"):
            optimizer.train()
        for step, _ in run.steps(total_steps=until):
            torch.manual_seed(step)
            model(torch.randn(4, SIZE)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            if run.step_count == STOP and resumed is None:
                run.save()
    with torch.no_grad():
        out = model(torch.ones(2, SIZE))
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {**trained, "out": out}, resumed


def goes_on(
    directory: Path, make: Callable[[int], nn.Module], optimizer_of: Callable[[Any], Any]
) -> None:
    model = make(0)
    whole, _ = run_of(directory, model, optimizer_of(model), STEPS)
    other = make(1)
    rest, resumed = run_of(directory, other, optimizer_of(other), STEPS)
    assert resumed.step == STOP
    assert resumed.bit_exact, resumed
    assert whole.keys() == rest.keys()
    assert all(torch.equal(whole[name], rest[name]) for name in whole)


def quantized(kind: str) -> Callable[[int], nn.Module]:
    bnb = pytest.importorskip("bitsandbytes")

    def layer() -> nn.Module:
        weight = torch.randn(SIZE, SIZE) / 8
        if kind == "8 bits":
            made = bnb.nn.Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False)
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            how = {"quant_type": kind, "compress_statistics": True}
            made = bnb.nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=torch.float32, **how)
            made.weight = bnb.nn.Params4bit(weight, requires_grad=False, **how)
        out: nn.Module = made.to("cpu")
        return out

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        adapter = nn.Sequential(nn.Linear(SIZE, 4, bias=False), nn.Linear(4, SIZE, bias=False))
        return nn.Sequential(layer(), adapter, layer())

    return make


@pytest.mark.kind("weights in 4 and 8 bits (bitsandbytes)", resumed="exact")
@pytest.mark.parametrize("kind", ["nf4", "fp4", "8 bits"])
def test_quantized_weights_with_an_adapter_go_on(kind: str, tmp_path: Path) -> None:
    def optimizer_of(model: nn.Module) -> Any:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)

    goes_on(tmp_path, quantized(kind), optimizer_of)


def low_bit(kind: str) -> Callable[[Any], Any]:
    optimizers = pytest.importorskip("torchao.optim")
    return lambda model: getattr(optimizers, kind)(model.parameters(), lr=1e-2)


# torchao registers enums that newer versions of torch know already, and loads what is not there
@pytest.mark.filterwarnings("ignore:.*is an Enum subclass")
@pytest.mark.filterwarnings("ignore:.*register_constant")
# of torch's own, as its compiler is imported
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.kind("optimizer states and weights of few bits (torchao)", resumed="exact")
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_optimizer_states_of_few_bits_go_on(kind: str, tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(SIZE, SIZE)

    optimizer_of = low_bit(kind)
    model = make(0)
    optimizer = optimizer_of(model)
    model(torch.ones(1, SIZE)).sum().backward()
    optimizer.step()
    assert type(optimizer.state[model.weight]["exp_avg"]).__module__.startswith("torchao")
    goes_on(tmp_path, make, optimizer_of)


def test_integer_weights_with_an_adapter_go_on(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False))
        quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
        base.requires_grad_(False)
        return nn.Sequential(nn.Linear(SIZE, SIZE), base)

    goes_on(
        tmp_path, make, lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad])
    )


@pytest.mark.parametrize("name", [["os", "system"], ["torchao.optim", "AdamW8bit"], ["torch", "x"]])
def test_a_checkpoint_names_no_class_but_of_tensors(name: list[str]) -> None:
    if name[0] == "torchao.optim":
        pytest.importorskip("torchao")
    with pytest.raises(actckpt.CheckpointFormatError, match="no class of tensors known here"):
        decode({"$wrapper": name, "tensors": {}, "context": None}, {}, "state.json")


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(SIZE, 3)


def _lookahead(parameters: Any) -> Any:
    wrappers = pytest.importorskip("pytorch_optimizer")
    return wrappers.Lookahead(torch.optim.AdamW(parameters, 1e-2), k=2)


def _schedule_free(parameters: Any) -> Any:
    wrappers = pytest.importorskip("schedulefree")
    return wrappers.ScheduleFreeWrapper(torch.optim.SGD(parameters, 0.05), momentum=0.9)


def _schedule_free_too(parameters: Any) -> Any:
    wrappers = pytest.importorskip("pytorch_optimizer")
    return wrappers.ScheduleFreeWrapper(torch.optim.SGD(parameters, 0.05), momentum=0.9)


@pytest.mark.kind("wrappers of optimizers (Lookahead, ScheduleFree)", resumed="exact")
@pytest.mark.parametrize("wrapped", [_lookahead, _schedule_free, _schedule_free_too])
def test_wrappers_of_libraries_go_on(wrapped: Any, tmp_path: Path) -> None:
    goes_on(tmp_path, linear, lambda model: wrapped(model.parameters()))


class Slow(torch.optim.Optimizer):
    """Averages every other step; its state is that of the optimizer inside, and no more."""

    def __init__(self, parameters: Any) -> None:
        self.inner = torch.optim.Adam(parameters, 0.05)
        self.param_groups = self.inner.param_groups
        self.defaults = self.inner.defaults
        self.state = self.inner.state
        self.count = 0
        self.slow: dict[torch.Tensor, torch.Tensor] = {}

    def step(self, closure: Any = None) -> Any:
        self.inner.step()
        self.count += 1
        for p in self.param_groups[0]["params"]:
            slow = self.slow.setdefault(p, p.detach().clone())
            if self.count % 2 == 0:
                with torch.no_grad():
                    p.copy_(slow.lerp_(p, 0.5))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad()

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)


@pytest.mark.kind("an optimizer whose state leaves something out", resumed="exact")
def test_what_a_state_leaves_out_is_kept_beside(tmp_path: Path) -> None:
    goes_on(tmp_path, linear, lambda model: Slow(model.parameters()))


def test_groups_that_are_shared_stay_so(tmp_path: Path) -> None:
    for seed in range(2):
        model = linear(seed)
        optimizer = Slow(model.parameters())
        run_of(tmp_path, model, optimizer, STOP)
    assert optimizer.param_groups is optimizer.inner.param_groups


class Broken(Slow):
    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict["inner"])


class Scaled(nn.Linear):
    """Its state has what nobody takes back."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scales"] = torch.ones(3)


@pytest.mark.kind("a state that cannot be put back", resumed="said no")
@pytest.mark.parametrize(
    ("model", "optimizer_of", "message"),
    [
        (nn.Linear(SIZE, 2), lambda m: Broken(m.parameters()), "KeyError: 'inner'"),
        (
            nn.Sequential(nn.Linear(SIZE, 2), Scaled(2, 2)),
            lambda m: torch.optim.SGD(m.parameters()),
            r"model\['1\.scales'\] is in the state of the Sequential",
        ),
    ],
    ids=["optimizer", "module"],
)
def test_what_cannot_be_put_back_is_refused_when_it_is_saved(
    model: Any, optimizer_of: Any, message: str, tmp_path: Path
) -> None:
    with actckpt.Checkpointer(
        tmp_path, model=model, optimizer=optimizer_of(model), every=None
    ) as run:
        with pytest.raises(actckpt.CheckpointSaveError, match=message):
            run.save()
        assert run.list() == []
