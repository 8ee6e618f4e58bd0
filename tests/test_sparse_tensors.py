"""Tensors that are no window on one storage: sparse and complex ones count, ragged ones do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import actckpt
from actckpt.rewriting.installing import installed
from tests.budgets import Step, outcome_of
from tests.exact import scalar_loss

NODES, DEGREE, WIDTH = 300, 40, 32


def adjacency(layout: str, degree: int = DEGREE) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    edges = torch.randint(NODES, (2, NODES * degree), generator=g)
    weights = torch.rand(NODES * degree, generator=g) / degree
    size = (NODES, NODES)
    found = torch.sparse_coo_tensor(edges, weights, size, check_invariants=False).coalesce()
    return found if layout == "coo" else found.to_sparse_csr()


class GraphNet(nn.Module):
    """Blocks that each pass messages along the edges of a sparse adjacency."""

    def __init__(self, known: torch.Tensor | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(5)
        )
        self.register_buffer("known", known, persistent=False)

    def forward(self, x: torch.Tensor, edges: torch.Tensor | None = None) -> torch.Tensor:
        if edges is None:
            edges = self.get_buffer("known")
        for block in self.blocks:
            x = x + torch.sparse.mm(edges, block(x))
        return x


def backward_of(batch: tuple[torch.Tensor, ...]) -> Step:
    def step(model: nn.Module) -> torch.Tensor:
        loss = scalar_loss(model(*batch))
        loss.backward()
        return loss

    return step


@pytest.mark.kind("a sparse argument or buffer", bits=True, peak="within")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("where", ["argument", "buffer"])
@pytest.mark.parametrize(("layout", "share"), [("coo", 0.5), ("csr", 0.75)])
def test_a_graph_net(layout: str, share: float, where: str) -> None:
    edges = adjacency(layout)
    x = torch.randn(NODES, WIDTH, generator=torch.Generator().manual_seed(1))
    batch = (x, edges) if where == "argument" else (x,)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return GraphNet(None if where == "argument" else edges)

    found = outcome_of(make, batch, backward_of(batch), share=share, loss_fn=scalar_loss)
    assert found.exact_and_within, found


def test_more_edges_are_another_batch() -> None:
    torch.manual_seed(0)
    model = GraphNet()
    x = torch.randn(NODES, WIDTH)
    actckpt.optimize(model, 1.0, batch=(x, adjacency("coo", 4)), loss_fn=scalar_loss)
    few = actckpt.report(model).planned.predicted.peak_bytes
    backward_of((x, adjacency("coo", 40)))(model)
    many = actckpt.report(model).planned.predicted.peak_bytes
    assert many - few > 36 * NODES * (2 * 8 + 4) * 0.9


class Spectral(nn.Module):
    """A convolution by multiplying complex weights in frequency space."""

    def __init__(self, width: int = 8, modes: int = 6) -> None:
        super().__init__()
        self.modes = modes
        weights = torch.randn(width, width, modes, modes, dtype=torch.cfloat)
        self.weights = nn.Parameter(weights / width)
        self.skip = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = self.modes
        spectrum = torch.fft.rfft2(x)
        out = torch.zeros_like(spectrum)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], self.weights)
        return nn.functional.gelu(torch.fft.irfft2(out, s=x.shape[-2:]) + self.skip(x))


def test_a_fourier_operator() -> None:
    batch = (torch.randn(4, 8, 32, 32, generator=torch.Generator().manual_seed(1)),)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(Spectral() for _ in range(4)))

    found = outcome_of(make, batch, backward_of(batch), share=0.85, loss_fn=scalar_loss)
    assert found.exact_and_within, found


class Ragged(nn.Module):
    """Sequences of any length, as one nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Any) -> torch.Tensor:
        if isinstance(x, list):
            rows = [self.table(t) for t in x]
            x = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        else:
            x = torch.nested.nested_tensor_from_jagged(self.table(x.values()), x.offsets())
        out: torch.Tensor = self.linear(x).values().square().mean()
        return out


@pytest.mark.kind("nested (ragged) tensors", peak="said")
@pytest.mark.parametrize("where", ["argument", "forward"])
@pytest.mark.parametrize("lazily", [True, False])
def test_ragged_tensors_are_refused(where: str, lazily: bool) -> None:
    sequences: Any = [torch.arange(n) for n in (3, 5, 4)]
    if where == "argument":
        sequences = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    model = Ragged()
    batch = None if lazily else (sequences,)
    with pytest.raises(actckpt.TraceError, match="nested") as caught:
        actckpt.optimize(model, 1.0, batch=batch)(sequences)
    assert len(str(caught.value).splitlines()) <= 10
    assert "What works" in str(caught.value)
    actckpt.revert(model)
    assert installed(model) is None
    model(sequences).backward()


@pytest.mark.kind("a gradient that is handed out is sparse", bits=True)
def test_gradients_that_are_handed_out_may_be_sparse() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(50, 16, sparse=True), nn.Linear(16, 2)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.out(torch.relu(self.table(rows)))
            return y

    torch.manual_seed(0)
    model = Looked()
    rows = torch.randint(0, 50, (8, 6))

    def gradients() -> list[torch.Tensor]:
        out, parameters = model(rows), list(model.parameters())
        first = torch.autograd.grad(out[..., 0].sum(), parameters, retain_graph=True)
        return [*first, *torch.autograd.grad(out[..., 1].sum(), parameters)]

    wanted = gradients()
    actckpt.optimize(model, 0.01)
    for _ in range(3):
        for found, one in zip(gradients(), wanted, strict=True):
            assert found.layout == one.layout
            assert torch.equal(found.to_dense(), one.to_dense())
