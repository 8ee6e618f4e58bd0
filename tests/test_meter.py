"""The byte meters: allocator truth, live storages, and what is resident."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import actckpt
from actckpt.data.graph import Category
from actckpt.profiler.census import resident_bytes, sizes
from actckpt.profiler.live import LiveMeter
from actckpt.profiler.meter import AllocatorMeter

_ONEDNN = torch.backends.mkldnn.is_available()


class _Register(TorchDispatchMode):
    def __init__(self, meter: LiveMeter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.meter.register(x)
        self.meter.note()
        return result


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


def _convolutions() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Conv2d(3, 16, 3), _Block(16), _Block(16)), torch.randn(4, 3, 24, 24)


def _linears() -> tuple[nn.Module, torch.Tensor]:
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)]
    return nn.Sequential(*layers), torch.randn(128, 64)


def _live_step(net: nn.Module, x: torch.Tensor) -> tuple[LiveMeter, int]:
    """The meter of one step that starts without gradients, and the level before it."""
    net.zero_grad()
    meter = LiveMeter()
    for resident in (*net.parameters(), *net.buffers(), x):
        meter.register(resident)
    before = meter.level_bytes
    with _Register(meter):
        net(x).sum().backward()
    return meter, before


def _allocator_step(net: nn.Module, x: torch.Tensor) -> AllocatorMeter:
    net.zero_grad()
    with AllocatorMeter() as meter:
        net(x).sum().backward()
    return meter


def test_allocator_meter_equals_known_allocations() -> None:
    for _ in range(2):
        with AllocatorMeter() as meter:
            a = torch.empty(1000)
            meter.mark()
            b = torch.empty(500)
            del a
            c = torch.empty(250)
            meter.mark()
            del b
        assert meter.timeline == (4000, 6000, 2000, 3000, 1000)
        assert (meter.peak_bytes, meter.end_bytes) == (6000, 1000)
        assert [(s.start_bytes, s.peak_bytes, s.end_bytes) for s in meter.segments] == [
            (0, 4000, 4000),
            (4000, 6000, 3000),
            (3000, 3000, 1000),
        ]
        assert meter.reserved_bytes is None
        del c


def test_what_has_no_shape_yet_takes_no_memory() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules say that they are new
        model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    assert resident_bytes(model, None, None)[Category.PARAMETER] == 4 * (16 + 4)
    assert len(sizes(model.parameters())) == 2


def test_allocator_meter_counts_release_of_older_blocks() -> None:
    a = torch.empty(1000)
    w = torch.ones(500, requires_grad=True)
    w.sum().backward()
    with AllocatorMeter() as meter:
        del a
        b = torch.empty(100)
        w.grad = None
    assert meter.timeline == (-4000, -3600, -5600)
    assert (meter.peak_bytes, meter.end_bytes) == (0, -5600)
    del b


def test_allocator_meter_is_not_misled_by_an_earlier_session() -> None:
    # torch remembers the size of a block that it saw allocated, also when it did not see it freed
    with AllocatorMeter():
        kept = [torch.empty(1 << 16) for _ in range(8)]
    kept.clear()
    again = [torch.empty(1 << 16) for _ in range(8)]
    with AllocatorMeter() as meter:
        again.clear()
    assert meter.end_bytes == -8 * 4 * (1 << 16)


def test_marks_are_exact_where_addresses_are_reused() -> None:
    with AllocatorMeter(residents=False) as meter:
        for _ in range(200):
            for size in (1, 2, 3):
                torch.empty(size, dtype=torch.uint8)
            meter.mark()
            a = torch.empty(100)
            del a
            meter.mark()
    assert [s.peak_bytes for s in meter.segments[1::2]] == [400] * 200
    assert [s.peak_bytes for s in meter.segments[0:-1:2]] == [3] * 200


def test_allocator_meter_leaves_standard_error_alone(capfd: pytest.CaptureFixture[str]) -> None:
    older = [torch.empty(10) for _ in range(3)]
    with AllocatorMeter():
        older.clear()
    assert capfd.readouterr().err == ""


def test_allocator_meter_survives_an_exception() -> None:
    with pytest.raises(RuntimeError, match="inside"), AllocatorMeter():
        raise RuntimeError("inside")
    with AllocatorMeter() as meter:
        a = torch.empty(1000)
    assert meter.peak_bytes == 4000
    del a


def test_both_meters_agree_without_kernel_scratch() -> None:
    net, x = _linears()
    allocator = _allocator_step(net, x)
    live, before = _live_step(net, x)
    # wrapped scalars live inside operations only
    assert 0 <= allocator.peak_bytes - (live.peak_bytes - before) <= 64
    assert allocator.end_bytes == live.level_bytes - before


@pytest.mark.skipif(not _ONEDNN, reason="no oneDNN")
def test_allocator_meter_sees_scratch_of_convolutions() -> None:
    net, x = _convolutions()
    _allocator_step(net, x)
    first, second = _allocator_step(net, x), _allocator_step(net, x)
    assert first.peak_bytes == second.peak_bytes
    live, before = _live_step(net, x)
    assert first.peak_bytes > live.peak_bytes - before
    assert first.end_bytes == live.level_bytes - before


def test_live_meter_follows_storages_to_their_death() -> None:
    dead: list[int] = []
    meter = LiveMeter(on_death=dead.append)
    a = torch.empty(100)
    b = a.view(10, 10)
    assert meter.register(a, Category.PARAMETER) == 0
    assert meter.register(b) == 0
    c = torch.empty(50)
    assert meter.id_of(c) is None
    assert meter.register(c) == 1
    assert meter.levels[Category.PARAMETER] == 400
    assert meter.level_bytes == meter.peak_bytes == 600
    assert meter.peak_levels[Category.ACTIVATION] == 200
    del a
    assert dead == []
    del b
    assert dead == [0]
    meter.note(1000)
    assert (meter.level_bytes, meter.peak_bytes, meter.peak_workspace_bytes) == (200, 1200, 1000)
    meter.move(c, Category.GRADIENT)
    assert (meter.levels[Category.ACTIVATION], meter.levels[Category.GRADIENT]) == (0, 200)
    assert meter.bytes_of(1) == 200
    meter.close()
    del c
    assert dead == [0]


def test_live_meter_keeps_identity_while_only_autograd_holds_a_storage() -> None:
    meter = LiveMeter()
    x = torch.ones(10, requires_grad=True)
    y = x.exp()
    first = meter.register(y)
    node: Any = y.grad_fn
    del y
    gc.collect()
    churn = [torch.empty(10).untyped_storage() for _ in range(100)]
    assert meter.id_of(node._saved_result) == first
    assert meter.level_bytes == 40
    del node, churn
    assert meter.level_bytes == 0


def test_live_meter_rereads_resized_storages() -> None:
    meter = LiveMeter()
    x = torch.empty(10)
    meter.register(x)
    x.resize_(100)
    meter.register(x)
    assert meter.level_bytes == 400
    x.untyped_storage().resize_(0)
    meter.refresh()
    assert (meter.level_bytes, meter.peak_bytes) == (0, 400)
    del x
    assert meter.level_bytes == 0


def test_live_meter_filters_devices_and_takes_sparse_parts() -> None:
    meter = LiveMeter("cpu")
    assert meter.register(torch.empty(10, device="meta")) is None
    assert meter.register(torch.empty(0)) is not None
    sparse = torch.eye(4).to_sparse()
    meter.register(sparse)
    assert meter.level_bytes == 4 * 4 + 2 * 4 * 8
    del sparse
    assert meter.level_bytes == 0
    with FakeTensorMode():
        fake = torch.empty(10)
    assert meter.register(fake) is not None


@pytest.mark.parametrize("make", [_linears, _convolutions])
def test_live_meter_is_the_same_on_fake_and_real(
    make: Callable[[], tuple[nn.Module, torch.Tensor]],
) -> None:
    real, before = _live_step(*make())
    with FakeTensorMode():
        fake, before_fake = _live_step(*make())
    assert before == before_fake
    assert real.peak_bytes == fake.peak_bytes > before
    assert real.peak_levels == fake.peak_levels
    assert real.level_bytes == fake.level_bytes


def test_resident_bytes_counts_each_storage_once() -> None:
    net = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Linear(10, 10))
    net[2].weight = net[0].weight
    optimizer = torch.optim.AdamW(net.parameters())
    x = torch.randn(4, 10)
    net(x).sum().backward()
    optimizer.step()
    trained = 4 * (100 + 10 + 20 + 10)
    found = resident_bytes(net, optimizer, {"x": x, "again": [x.view(-1), x.to("meta")]})
    assert found[Category.PARAMETER] == trained
    assert found[Category.BUFFER] == 4 * 20 + 8
    assert found[Category.GRADIENT] == trained
    assert found[Category.OPTIMIZER] == 2 * trained + 4 * 5  # one step counter each
    assert found[Category.BATCH] == 160


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_allocator_meter_on_cuda() -> None:
    with AllocatorMeter("cuda") as meter:
        a = torch.empty(1 << 20, device="cuda")
        b = torch.empty(1 << 20, device="cuda")
        del a
    assert (meter.peak_bytes, meter.end_bytes) == (8 << 20, 4 << 20)
    assert meter.reserved_bytes is not None
    assert meter.reserved_bytes >= 8 << 20
    del b


def test_a_step_with_sparse_gradients_is_measured() -> None:
    def measured(sparse: bool) -> actckpt.Measurement:
        model = nn.Sequential(nn.Embedding(4096, 16, sparse=sparse), nn.Linear(16, 4))
        return actckpt.measure(model, torch.arange(8), loss_fn=lambda out: out.sum(), steps=1)

    few, all_rows = measured(True), measured(False)
    # eight rows and their numbers in place of 4,096
    assert 0 < few.peak_bytes < all_rows.peak_bytes - 4000 * 16 * 4
