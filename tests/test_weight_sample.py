"""The weights that a journal samples: bounded at each step, and all of them in turn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from actckpt.resuming.weight_sample import (
    OTHER_BYTES,
    OTHER_PIECES,
    TRAINED_BYTES,
    TRAINED_PIECES,
    UNREAD,
    WeightSampler,
)


class Mixed(nn.Module):
    """Weights of every kind: large, small, tied, frozen, channels last, buffers, of 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(300, 400)
        self.convolution = nn.Conv2d(16, 32, 3)
        self.convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norms = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(9))
        self.halves = nn.Linear(7, 5).bfloat16()
        self.frozen = nn.Linear(200, 100).requires_grad_(False)
        self.tied = nn.Linear(300, 400)
        self.tied.weight = self.large.weight
        self.register_buffer("cache", torch.zeros(9), persistent=False)
        self.register_buffer("empty", torch.zeros(0))


def samples(sampler: WeightSampler, module: nn.Module) -> list[str]:
    """All of a rotation."""
    found = []
    for step in range(sampler.steps):
        sample = sampler.sample(step)
        assert sample is not None
        size_bytes = sum((p.end - p.begin) * p.weight.itemsize for p in sample.pieces)
        assert size_bytes <= TRAINED_BYTES + OTHER_BYTES == 64 << 10
        assert len(sample.pieces) <= TRAINED_PIECES + OTHER_PIECES
        digests = sample.digests()
        assert UNREAD not in digests
        found.append(digests)
    return found


def _order(tensor: torch.Tensor) -> list[int]:
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: -strides[d])


def flip(tensor: torch.Tensor, place: int) -> None:
    """The last bit of one element, in the order of memory."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    tensor.detach().reshape(-1).view(integer)[place] ^= 1


def test_every_weight_is_in_a_sample_within_one_rotation() -> None:
    torch.manual_seed(0)
    model = Mixed()
    sampler = WeightSampler({"": model})
    assert sampler.steps == 20
    before = samples(sampler, model)
    assert samples(sampler, model) == before
    for name, tensor in model.state_dict().items():
        for place in {0, tensor.numel() - 1} if tensor.numel() else ():
            element = tensor.view(-1) if tensor.dim() < 2 else tensor.permute(*_order(tensor))
            flip(element, place)
            after = samples(sampler, model)
            changed = sum(a != b for a, b in zip(before, after, strict=True))
            assert 1 <= changed <= 2, (name, place)  # frozen ones take longer than the others
            flip(element, place)
    assert samples(sampler, model) == before


def test_what_differs_is_named_by_its_place() -> None:
    model = nn.Linear(300, 400, bias=False)
    sampler = WeightSampler({"": model, "ema": copy.deepcopy(model).requires_grad_(False)})
    names = []
    for step in range(sampler.steps):
        sample = sampler.sample(step)
        assert sample is not None
        names.append([str(piece) for piece in sample.pieces])
    assert names[0] == ["weight[0:12288]", "ema.weight[0:4096]"]
    assert names[-1] == ["weight[110592:120000]", "ema.weight[118784:120000]"]


def test_a_parameter_that_takes_anothers_place_is_read() -> None:
    model = nn.Linear(3, 3)
    sampler = WeightSampler({"": model})
    first = sampler.sample(0)
    assert first is not None
    model.weight = nn.Parameter(torch.ones(3, 3))
    second = sampler.sample(0)
    assert second is not None
    assert first.rotation == second.rotation
    assert first.digests()[8:] == second.digests()[8:]
    assert first.digests()[:8] != second.digests()[:8]
    model.weight.requires_grad_(False)
    sampler.forget()
    third = sampler.sample(0)
    assert third is not None
    assert third.rotation != second.rotation


def test_what_cannot_be_read_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    sampler = WeightSampler({"": model})
    sampler.sample(0)
    model[0].get_parameter("weight").untyped_storage().resize_(0)
    model[1].bias = nn.Parameter(torch.ones(1).expand(3))
    del model[1]._parameters["weight"]
    sample = sampler.sample(0)
    assert sample is not None
    digests = sample.digests()
    assert [digests[at : at + 8] == UNREAD for at in range(0, len(digests), 8)] == [
        True,
        False,
        True,
        True,
    ]
    assert WeightSampler({"": nn.ReLU()}).sample(3) is None
    assert WeightSampler({"": nn.ReLU()}).steps == 1


def test_tensors_made_of_others_are_read_in_parts() -> None:
    two_tensors = pytest.importorskip("torch.testing._internal.two_tensor")
    made: Any = two_tensors.TwoTensor(torch.ones(4), torch.zeros(4))
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(made))
    sampler = WeightSampler({"": model})
    sample = sampler.sample(0)
    assert sample is not None
    assert [str(piece) for piece in sample.pieces] == ["weight.a", "weight.b"]
    assert UNREAD not in sample.digests()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_device_the_same_is_read_and_nothing_waits() -> None:
    torch.manual_seed(0)
    model = Mixed()
    there = copy.deepcopy(model).cuda()
    here, device = WeightSampler({"": model}), WeightSampler({"": there})
    first = device.sample(0)  # gets pinned memory
    assert first is not None
    first.wait()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(here.steps):
            a, b = here.sample(step), device.sample(step)
            assert a is not None
            assert b is not None
            while not b.ready:
                pass
            assert (a.rotation, a.digests()) == (b.rotation, b.digests())
    finally:
        torch.cuda.set_sync_debug_mode("default")
