"""Measured and estimated costs of operations, and their cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actckpt.data.graph import Graph
from actckpt.data.profile import Cost, Profile
from actckpt.errors import PlanError
from actckpt.profiler import build, roofline
from actckpt.profiler.arguments import input_bytes, rebuild
from actckpt.profiler.build import build_profile
from actckpt.profiler.devices import DEVICES
from actckpt.profiler.roofline import estimate, machine_of
from actckpt.profiler.store import CostStore
from actckpt.profiler.timing import is_view, workspaces
from actckpt.tracing.signature import encode

_HERE = torch.device("cpu")
_ONEDNN = torch.backends.mkldnn.is_available()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _graph(*signatures: str) -> Graph:
    return Graph("cpu", (), (), (), (), (), signatures)


def _place(_: torch.device) -> torch.device:
    return _HERE


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def _long(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long)


_MM = encode("aten.mm.default", [_ones(64, 64), _ones(64, 64)], {})
_VIEW = encode("aten.view.default", [_ones(64, 64), [4096]], {})
_CONV = encode(
    "aten.convolution.default",
    [
        _ones(4, 16, 32, 32),
        _ones(16, 16, 3, 3),
        None,
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        1,
    ],
    {},
)
_OTHER = encode("aten.uniform_.default", [_ones(1000)], {"generator": torch.Generator()})


def _unusual() -> Sequence[str]:
    q = _ones(2, 2, 8, 16)
    pooled = _long(1, 2, 2, 2)
    lstm = [_ones(6, 2, 8), _ones(32, 8), _ones(32, 8), _ones(32), _ones(32)]
    return (
        encode("aten.embedding.default", [_ones(10, 4), _long(3), 0], {}),
        encode("aten.embedding_dense_backward.default", [_ones(3, 4), _long(3), 10, 0, False], {}),
        encode(
            "aten.nll_loss_backward.default",
            [_ones(), _ones(6, 5), _long(6), None, 1, -100, _ones()],
            {},
        ),
        encode("aten.gather.default", [_ones(4, 5), 1, _long(4, 2)], {}),
        encode("aten.index.Tensor", [_ones(4, 5), [_long(7), None]], {}),
        encode(
            "aten.max_pool2d_with_indices_backward.default",
            [_ones(1, 2, 2, 2), _ones(1, 2, 4, 4), [2, 2], [2, 2], [0, 0], [1, 1], False, pooled],
            {},
        ),
        encode("aten.native_dropout.default", [_ones(8, 8), 0.1, True], {}),
        encode("aten.native_layer_norm.default", [_ones(4, 8), [8], _ones(8), _ones(8), 1e-5], {}),
        encode(
            "aten.native_batch_norm.default",
            [_ones(2, 3, 4, 4), _ones(3), _ones(3), _ones(3), _ones(3), True, 0.1, 1e-5],
            {},
        ),
        encode(
            "aten._scaled_dot_product_flash_attention_for_cpu.default", [q, q, q, 0.0, True], {}
        ),
        encode(
            "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
            [q, q, q, q, q, _ones(2, 2, 8), 0.0, True],
            {},
        ),
        encode("aten.upsample_nearest2d.default", [_ones(1, 2, 4, 4), [8, 8], 2.0, 2.0], {}),
        encode(
            "aten.mkldnn_rnn_layer.default",
            [*lstm, _ones(1, 2, 8), _ones(1, 2, 8), False, [], 2, 8, 1, True, False, False, True],
            {},
        ),
        encode("aten.mul_.Tensor", [_ones(8), 0.001], {}),
        encode("aten._foreach_add_.Scalar", [[_ones(8), _ones(3)], 1], {}),
        encode("aten.mm.default", [_ones(8, 8).bfloat16(), _ones(8, 8).bfloat16()], {}),
        encode("aten.add.Tensor", [torch.ones(1, dtype=torch.complex64).expand(5), 1], {}),
    )


def test_measures_what_can_run(cache: Path) -> None:
    profile = build_profile(_graph(_MM, _CONV, _VIEW, _MM), cache_dir=cache)
    assert [c.source for c in profile.costs] == ["measured"] * 4
    assert profile.costs[0] == profile.costs[3]
    assert all(0 < c.time_s < 1 for c in profile.costs)
    assert profile.costs[0].workspace_bytes == 0
    assert profile.dispatch_s > 0
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


@pytest.mark.skipif(not _ONEDNN, reason="no oneDNN")
def test_sees_the_scratch_of_a_convolution() -> None:
    conv, product = workspaces([_CONV, _MM], _HERE, _place)
    assert conv > 0
    assert product == 0


def test_a_failure_does_not_shift_the_workspaces_of_others() -> None:
    wrong = encode("aten.mm.default", [_ones(3, 4), _ones(3, 4)], {})
    alone = workspaces([_CONV], _HERE, _place)
    assert workspaces([_OTHER, wrong, _CONV, _MM], _HERE, _place) == [0, 0, *alone, 0]


def test_unusual_arguments_run(cache: Path) -> None:
    profile = build_profile(_graph(*_unusual()), cache_dir=cache)
    assert [c.source for c in profile.costs] == ["measured"] * len(profile.costs)


def test_estimates_what_cannot_run(cache: Path) -> None:
    missing = encode("aten.no_such_operation.default", [_ones(1000)], {})
    failing = encode("aten.mm.default", [_ones(3, 4), _ones(3, 4)], {})
    profile = build_profile(_graph(_OTHER, missing, failing), cache_dir=cache)
    assert [c.source for c in profile.costs] == ["roofline"] * 3
    assert all(c.time_s > 0 for c in profile.costs)


def test_estimates_what_is_too_large_without_allocating(cache: Path) -> None:
    huge = torch.empty(1 << 20, 1 << 14, device="meta")
    signature = encode("aten.neg.default", [huge], {})
    assert input_bytes(signature) == 4 << 34
    (cost,) = build_profile(_graph(signature), cache_dir=cache).costs
    assert cost.source == "roofline"
    assert cost.time_s > 0.1


def test_second_time_comes_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _graph(_MM, _CONV)
    first = build_profile(graph, cache_dir=cache)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    for name in ("time_ops", "workspaces", "calibrate", "estimate"):
        monkeypatch.setattr(build, name, refuse)
    assert build_profile(graph, cache_dir=cache) == first


def test_an_estimate_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _graph(_OTHER)
    assert build_profile(graph, cache_dir=cache).costs[0].source == "roofline"
    asked: list[str] = []
    estimated = roofline.estimate

    def watched(signature: str, machine: Any) -> Cost:
        asked.append(signature)
        return estimated(signature, machine)

    monkeypatch.setattr(build, "estimate", watched)
    build_profile(graph, cache_dir=cache)
    assert asked == [_OTHER]


@pytest.mark.parametrize("garbage", [b"not a database at all" * 100, b"SQLite format 3\0" + b"x"])
def test_a_corrupted_cache_is_begun_anew(
    tmp_path: Path, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = CostStore(tmp_path, "here")
    store.put({"s": Cost(1.0, 2, "measured")})
    store.path.write_bytes(garbage)
    with caplog.at_level(logging.WARNING):
        assert store.costs(["s"]) == {}
    assert "corrupted" in caplog.text
    store.put({"s": Cost(1.0, 2, "measured")})
    assert store.costs(["s", "t"]) == {"s": Cost(1.0, 2, "measured")}
    assert CostStore(tmp_path, "elsewhere").costs(["s"]) == {}


def test_an_unusable_cache_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        profile = build_profile(_graph(_VIEW), cache_dir=tmp_path / "file")
    assert profile.costs[0].source == "measured"
    assert "not usable" in caplog.text


def test_cache_folder_is_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv("ACTCKPT_CACHE", str(tmp_path / "mine"))
    build_profile(_graph(_VIEW), measure=False)
    assert list((tmp_path / "mine").iterdir())


def test_random_state_and_modes_are_left_alone(cache: Path) -> None:
    drop = encode("aten.native_dropout.default", [_ones(5, 5), 0.5, True], {})
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        build_profile(_graph(drop, _MM), cache_dir=cache)
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_estimates_for_a_device_that_is_not_here() -> None:
    large = encode("aten.mm.default", [torch.empty(4096, 4096, device="meta")] * 2, {})
    profile = build_profile(_graph(large, _VIEW), device="H100")
    machine = machine_of(DEVICES["h100-80gb"])
    assert profile.costs[0].time_s == pytest.approx(2 * 4096**3 / machine.flops["float32"])
    assert profile.costs[1].time_s == machine.launch_s
    with pytest.raises(PlanError, match="no device"):
        build_profile(_graph(_MM), device="abacus")


def test_roofline_counts_bytes_where_memory_bounds() -> None:
    machine = machine_of(DEVICES["a100-80gb"])
    copy = encode("aten.neg.default", [torch.empty(1 << 26, device="meta")], {})
    assert estimate(copy, machine).time_s == pytest.approx(2 * (4 << 26) / machine.bandwidth)


def test_rebuilt_arguments_have_the_layout_of_the_signature() -> None:
    x = torch.ones(3, 1, 4)[:, :, ::2].expand(3, 5, 2)
    index = torch.zeros(6, dtype=torch.long)
    op, (y, dim, z), kwargs = rebuild(
        encode("aten.index_select.default", [x, 0, index], {}), _place
    )
    assert (y.shape, y.stride(), y.dtype, dim, kwargs) == (x.shape, x.stride(), x.dtype, 0, {})
    assert bool((y >= 0.1).all())
    assert bool((y < 1.01).all())
    assert int(z.max()) < 3
    assert op is torch.ops.aten.index_select.default


def test_views_are_known_by_their_schema() -> None:
    assert is_view(_VIEW)
    assert not is_view(_MM)
    assert not is_view(encode("aten.mul_.Tensor", [_ones(3), 2], {}))
