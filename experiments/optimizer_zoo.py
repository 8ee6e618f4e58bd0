"""Optimizers of torch and of three libraries, how each is made of a small model, and stepped."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ROWS, WIDTH, DEPTH = 512, 64, 5

Make = Callable[[nn.Module], Any]
Advance = Callable[[nn.Module, Any, int], None]


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return out


def model() -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(DEPTH)))


def batch(seed: int) -> torch.Tensor:
    """The rows of one step."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss(out: torch.Tensor) -> torch.Tensor:
    """A scalar."""
    return out.square().mean()


# ---- the optimizers


def zoo() -> dict[str, Make]:
    """Name -> how it is made of a model."""
    found: dict[str, Make] = {}

    def add(name: str, kind: Any, **options: Any) -> None:
        found[name] = lambda m: kind(m.parameters(), **{"lr": 1e-3, **options})

    for name, kind in sorted(vars(torch.optim).items()):
        # SparseAdam is for sparse gradients alone
        if inspect.isclass(kind) and name not in ("Optimizer", "SparseAdam"):
            add(f"torch.{name}", kind)
    add("torch.AdamW, fused", torch.optim.AdamW, fused=True)
    add("torch.AdamW, foreach", torch.optim.AdamW, foreach=True)
    add("torch.AdamW, amsgrad", torch.optim.AdamW, amsgrad=True)
    add("torch.AdamW, lr a tensor", torch.optim.AdamW, lr=torch.tensor(1e-3), foreach=False)
    found["torch.Muon beside AdamW"] = _muon_beside_adamw
    po = library("pytorch_optimizer")
    for name in po.get_supported_optimizers() if po else ():
        # one that looks back ten steps would not begin here; one is too slow on a processor
        needs: dict[str, dict[str, Any]] = {
            "adashift": {"keep_num": 2},
            "bsam": {"num_data": 1000},
            "ranger21": {"num_iterations": 100},
            "kron": {"max_size_triangular": 16},
        }
        add(f"pytorch_optimizer.{name}", _loaded(po, name), **needs.get(name, {}))
    for name in ("Lookahead", "TRAC", "OrthoGrad", "ScheduleFreeWrapper") if po else ():
        found[f"pytorch_optimizer.{name}(AdamW)"] = _wrapped(getattr(po, name))
    if po:
        found["pytorch_optimizer.SAM(SGD)"] = lambda m: po.SAM(
            m.parameters(), torch.optim.SGD, lr=1e-3, momentum=0.9
        )
    schedulefree = library("schedulefree")
    for name in ("AdamW", "SGD", "RAdam") if schedulefree else ():
        add(f"schedulefree.{name}", getattr(schedulefree, f"{name}ScheduleFree"))
    if schedulefree:
        found["schedulefree.Wrapper(SGD)"] = lambda m: schedulefree.ScheduleFreeWrapper(
            torch.optim.SGD(m.parameters(), 1e-3), momentum=0.9
        )
    bnb = library("bitsandbytes")
    for name in ("AdamW8bit", "Lion8bit", "PagedAdamW8bit", "AdEMAMix8bit") if bnb else ():
        add(f"bitsandbytes.{name}", getattr(bnb.optim, name))
    return found


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _loaded(library: Any, name: str) -> Any:
    return lambda *args, **options: library.load_optimizer(name)(*args, **options)


def _wrapped(kind: Any) -> Make:
    return lambda m: kind(torch.optim.AdamW(m.parameters(), 1e-3))


def _muon_beside_adamw(m: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in m.parameters() if p.ndim == 2]
    others = [p for p in m.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, 1e-3)]


def several(optimizer: Any) -> list[Any]:
    return optimizer if isinstance(optimizer, list) else [optimizer]


# ---- ways to step them


def usual(m: nn.Module, optimizer: Any, seed: int) -> None:
    """Forward, backward, step."""
    loss(m(batch(seed))).backward()
    for o in several(optimizer):
        o.step()
        o.zero_grad()


def twice_differentiable(m: nn.Module, optimizer: Any, seed: int) -> None:
    """For optimizers that ask for products with the Hessian."""
    loss(m(batch(seed))).backward(create_graph=True)
    optimizer.step()
    m.zero_grad()


def with_closure(m: nn.Module, optimizer: Any, seed: int) -> None:
    """For optimizers that run the model themselves."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        found = loss(m(batch(seed)))
        found.backward()
        return found

    optimizer.step(closure)
    optimizer.zero_grad()


def in_two_passes(m: nn.Module, optimizer: Any, seed: int) -> None:
    """For sharpness-aware ones."""
    loss(m(batch(seed))).backward()
    optimizer.first_step(zero_grad=True)
    loss(m(batch(seed))).backward()
    optimizer.second_step(zero_grad=True)


def told_the_loss(m: nn.Module, optimizer: Any, seed: int) -> None:
    """For optimizers that look at the loss."""
    found = loss(m(batch(seed)))
    found.backward()
    optimizer.step(lambda: found.detach())
    optimizer.zero_grad()


def fused_backward(m: nn.Module, optimizer: Any, seed: int) -> None:
    """For optimizers that step inside their own backward."""
    optimizer.fused_backward(loss(m(batch(seed))), lr=1e-3)


def matrices_apart(make: Make) -> Make:
    """Parameter groups that say which are for Muon."""

    class Grouped:
        def __init__(self, m: nn.Module) -> None:
            self.m = m

        def parameters(self) -> list[dict[str, Any]]:
            own = list(self.m.parameters())
            return [
                {"params": [p for p in own if p.ndim == 2], "use_muon": True},
                {"params": [p for p in own if p.ndim != 2], "use_muon": False},
            ]

    return lambda m: make(Grouped(m))  # type: ignore[arg-type]


def matrices_alone(make: Make) -> Make:
    """The others stay as they are."""

    class Grouped:
        def __init__(self, m: nn.Module) -> None:
            self.m = m

        def parameters(self) -> list[nn.Parameter]:
            return [p for p in self.m.parameters() if p.ndim == 2]

    return lambda m: make(Grouped(m))  # type: ignore[arg-type]


def of_the_model(make: Make) -> Make:
    """It takes the model in place of its parameters."""

    class Itself:
        def __init__(self, m: nn.Module) -> None:
            self.m = m

        def parameters(self) -> nn.Module:
            return self.m

    return lambda m: make(Itself(m))  # type: ignore[arg-type]


def as_made(make: Make) -> Make:
    """No other groups."""
    return make


WAYS: dict[str, tuple[Callable[[Make], Make], Advance]] = {
    "usual": (as_made, usual),
    "of the model": (of_the_model, usual),
    "fused backward": (of_the_model, fused_backward),
    "two passes": (as_made, in_two_passes),
    "told the loss": (as_made, told_the_loss),
    "matrices apart": (matrices_apart, usual),
    "matrices alone": (matrices_alone, usual),
    "create_graph": (as_made, twice_differentiable),
    "closure": (as_made, with_closure),
}
