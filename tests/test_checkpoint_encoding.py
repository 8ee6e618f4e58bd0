"""State to JSON and tensors and back: bit for bit, or refused by its key."""

from __future__ import annotations

import datetime
import enum
import json
import math
import struct
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.torch import load_file

from actckpt.checkpoint.commit import commit
from actckpt.checkpoint.dtypes import BY_NAME, CODES
from actckpt.checkpoint.encoding import encode
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.reading import read_state
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.errors import CheckpointSaveError


def round_trip(state: Any, directory: Path) -> Any:
    """``state`` through a committed checkpoint."""
    snapshot = Snapshot(1, {"item": encode(state, "item")}, "", {}, "", {})
    made = commit(Files(), str(directory), snapshot, serial=1)
    return read_state(Files(), str(made.path))[1]["item"]


def same(a: Any, b: Any) -> bool:
    """Equal in type and bit for bit."""
    if type(a) is not type(b):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and same_tensor(a, b)
    if isinstance(a, torch.Tensor):
        return same_tensor(a, b)
    if isinstance(a, np.ndarray):
        return bool((a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()))
    if isinstance(a, np.generic):
        return bool((a.dtype, a.tobytes()) == (b.dtype, b.tobytes()))
    if isinstance(a, dict):
        return [*map(repr, a)] == [*map(repr, b)] and all(
            same(x, y) for x, y in zip(a.values(), b.values(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    return bool(a == b)


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.numel():
        return True
    a, b = (x.detach().resolve_conj().resolve_neg().contiguous() for x in (a, b))
    a, b = (x.as_strided((x.numel(),), (1,)) for x in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


NAN = struct.unpack(">d", bytes.fromhex("7ff80000deadbeef"))[0]

STATES: dict[str, Any] = {
    "scalars": [None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**63, -(10**30), "", "ü\ud800\0"],
    "floats": [0.0, -0.0, 5e-324, 0.1, math.inf, -math.inf, NAN, -NAN, 1e308],
    "others": [b"", b"\0\xff", 1j, complex(NAN, -0.0), (), (1, (2,)), torch.Size([2, 3])],
    "torch": [torch.float32, torch.bfloat16, torch.device("cuda", 1), torch.device("cpu")],
    "keys": {0: 1, "0": 2, True: 3, None: 4, 1.5: 5, (1, "a"): 6, b"x": 7, math.nan: 8},
    "dollar": {"$tensor": "no", "$": {"$float": "0"}},
    "ordered": OrderedDict([("b", 1), ("a", OrderedDict())]),
    "counter": Counter({3: 2, 7: 1}),
    "sets": [{1, 2, 3}, frozenset({"a", (1, 2)}), set()],
    "arrays": [
        np.arange(6, dtype=">i2").reshape(2, 3), np.float32(0.1), np.int64(-1), np.bool_(True),
        np.zeros((0, 3)), np.array(5), np.array(["a", "bcd"]), np.datetime64("2020-01-01"),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.frombuffer(b"ab", dtype=np.uint8),
        np.complex64(1j), np.float16(math.nan),
    ],
    "names": {"__metadata__": torch.ones(1), "a/b": torch.zeros(1), "a": {"b": torch.ones(2)}},
    "numbers": {0: torch.zeros(1), "0": torch.ones(1)},
    "one tensor": torch.ones(3),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_every_value_comes_back_the_same(name: str, tmp_path: Path) -> None:
    assert same(round_trip(STATES[name], tmp_path), STATES[name])


@pytest.mark.parametrize("dtype", BY_NAME.values(), ids=BY_NAME)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    noise = torch.randint(0, 2 if dtype == torch.bool else 256, (4, 3, 64), dtype=torch.uint8)
    x = noise.view(dtype)
    state = {"x": x, "scalar": x[0, 0, 0], "empty": x[:, :0], "last": x[3]}
    assert same(round_trip(state, tmp_path), state)


def test_nan_payloads_survive(tmp_path: Path) -> None:
    x = torch.tensor([0x7FC0DEAD, 0xFF800001 - 2**32, 0x7F800001], dtype=torch.int32)
    assert same(round_trip(x.view(torch.float32), tmp_path), x.view(torch.float32))


def test_layouts(tmp_path: Path) -> None:
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    state = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base[0, 0].t(),
        "strided": base[..., ::2],
        "expanded": torch.ones(1).expand(4),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "offset": base.reshape(-1)[7:9],
    }
    found = round_trip(state, tmp_path)
    assert same(found, state)
    for name in ("channels_last", "transposed"):
        assert found[name].stride() == state[name].stride()
    assert found["strided"].is_contiguous()


def test_one_window_on_one_storage_is_stored_once_and_stays_one_tensor(tmp_path: Path) -> None:
    tied = torch.nn.Parameter(torch.randn(300, 5))
    state = {"a": tied, "b": tied.detach(), "part": tied[:2], "turned": tied.t()}
    found = round_trip(state, tmp_path)
    assert same(found, state)
    assert found["a"] is found["b"]
    assert found["a"].untyped_storage().data_ptr() != found["part"].untyped_storage().data_ptr()
    assert encode(state, "x").size_bytes == (2 * 1500 + 10) * 4


class Kind(enum.IntEnum):
    ONE = 1


class Sub(torch.Tensor):
    pass


loop: list[Any] = []
loop.append(loop)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "builtins.object"),
        (Kind.ONE, "Kind"),
        (lambda: 0, "function"),
        (datetime.date(2020, 1, 1), "datetime.date"),
        (Path("x"), "Path"),
        (bytearray(b"x"), "bytearray"),
        (np.array([object()]), "ndarray"),
        (np.zeros(2, dtype=[("a", "i4")]), "ndarray"),
        (torch.ones(2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2).as_subclass(Sub), "Sub"),
        (torch.nn.Linear(1, 1), "Linear"),
        ({Kind.ONE: 1}, "Kind"),
        (loop, "100 deep"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_anything_else_is_refused_by_its_key(value: Any, named: str) -> None:
    with pytest.raises(CheckpointSaveError) as found:
        encode({"groups": [{"ok": 1}, {"bad": value}]}, "optimizer")
    assert "optimizer['groups'][1]['bad']" in str(found.value)
    assert named in str(found.value)


def test_other_tools_read_the_files(tmp_path: Path) -> None:
    state = {str(dtype): torch.zeros(3, 8, dtype=torch.uint8).view(dtype) for dtype in CODES} | {
        "odd": torch.ones(5, dtype=torch.uint8),
        "empty": torch.ones(0, 2),
        "zero": torch.tensor(3),
    }
    round_trip(state, tmp_path)
    found = load_file(tmp_path / "step-00000001" / "item.safetensors")
    assert found.keys() == state.keys()
    assert all(same_tensor(found[name], x) for name, x in state.items())


def test_the_rest_is_strict_json(tmp_path: Path) -> None:
    round_trip(STATES, tmp_path)

    def never(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for path in (tmp_path / "step-00000001").glob("*.json"):
        json.loads(path.read_bytes(), parse_constant=never)


keys = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.floats(), st.binary())
arrays = npst.arrays(
    st.one_of(npst.floating_dtypes(), npst.integer_dtypes(), npst.boolean_dtypes()),
    npst.array_shapes(min_dims=0, min_side=0, max_side=4),
)
tensors = npst.arrays(
    st.sampled_from(["f2", "f4", "f8", "i1", "u1", "i2", "i4", "i8", "?"]),
    npst.array_shapes(min_dims=0, min_side=0, max_side=4),
).map(lambda a: torch.from_numpy(a.copy()))
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(),
    st.complex_numbers(), arrays, tensors, tensors.map(lambda t: t.to(torch.bfloat16)),
    tensors.map(lambda t: t.mT if t.dim() > 1 else t),
)  # fmt: skip
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=states)
def test_any_state_comes_back_the_same(
    state: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert same(round_trip(state, tmp_path_factory.mktemp("run")), state)
