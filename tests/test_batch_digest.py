"""The digest of a batch: any change is seen, nothing else is, and what was not read is named."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch

from actckpt.resuming.batch_digest import WHOLE_BYTES, batch_digest

Pair = namedtuple("Pair", ["a", "b"])


@dataclass
class Record:
    """A batch of the user's own class."""

    x: Any


class Bag:
    """Another, with attributes."""

    def __init__(self, x: Any) -> None:
        self.x = x


class Opaque:
    """One that cannot be looked into."""

    __slots__ = ("x",)


class Color(Enum):
    """Plain data that is no number."""

    RED = 1
    BLUE = 2


def big() -> torch.Tensor:
    """More than is read whole."""
    x = torch.arange(256 * 3 * 31 * 33, dtype=torch.float32).reshape(256, 3, 31, 33)
    assert x.numel() * 4 > 10 * WHOLE_BYTES
    return x


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "value": (torch.zeros(3), torch.tensor([0.0, 0.0, 1e-45])),
    "sign of zero": (torch.zeros(3), -torch.zeros(3)),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "dtype": (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
    "bfloat16": (torch.ones(3).bfloat16(), torch.zeros(3).bfloat16()),
    "order": ([torch.ones(1), torch.zeros(1)], [torch.zeros(1), torch.ones(1)]),
    "nested": ({"a": [torch.ones(1)]}, {"a": [torch.zeros(1)]}),
    "key": ({"a": 1}, {"b": 1}),
    "border of texts": (["ab", "c"], ["a", "bc"]),
    "border of lists": ([[1], [2, 3]], [[1, 2], [3]]),
    "array": (np.arange(3), np.arange(3) + 1),
    "texts of an array": (np.array(["a"]), np.array(["b"])),
    "objects of an array": (np.array([1, None]), np.array([1, 2])),
    "one and true": ([1, 2], [True, 2]),
    "dataclass": (Record(torch.ones(1)), Record(torch.zeros(1))),
    "named tuple": (Pair(1, 2), Pair(1, 3)),
    "attributes": (Bag(torch.ones(1)), Bag(torch.zeros(1))),
    "enum": (Color.RED, Color.BLUE),
    "set": ({1, 2}, {1, 3}),
    "sparse": (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
    "mask": (torch.tensor([True]), torch.tensor([False])),
    "none": (None, 0),
    "range": (range(3), range(4)),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_another_batch_has_another_digest(kind: str) -> None:
    a, b = DIFFERENT[kind]
    assert batch_digest(a).text != batch_digest(b).text
    assert batch_digest(a) == batch_digest(DIFFERENT[kind][0])
    assert not batch_digest(a).omitted


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "channels_last"])
def test_every_sample_of_a_large_batch_is_looked_into(layout: str) -> None:
    def laid(x: torch.Tensor) -> Any:
        if layout == "contiguous":
            return x
        if layout == "transposed":
            return x.transpose(1, 3)
        if layout == "sliced":
            return x[:, :, 1:]
        return x.to(memory_format=torch.channels_last)

    before = batch_digest(laid(big())).text
    for sample in (0, 1, 100, 254, 255):
        changed = big()
        changed[sample] += 1
        assert batch_digest(laid(changed)).text != before
        assert batch_digest(laid(changed).numpy()).text != batch_digest(laid(big()).numpy()).text
    assert batch_digest(laid(big())).text == before


def test_the_last_byte_of_a_large_tensor_is_read() -> None:
    x = torch.zeros(WHOLE_BYTES * 3 + 5, dtype=torch.uint8)
    for offset in (0, 1):  # at an odd address, too
        changed = x.clone()
        changed[-1] = 1
        assert batch_digest(x[offset:]) != batch_digest(changed[offset:])


def test_the_same_values_elsewhere_have_the_same_digest() -> None:
    assert batch_digest({"x": [1, "a"]}) == batch_digest(OrderedDict(x=[1, "a"]))
    x = torch.arange(6.0).reshape(2, 3)
    assert batch_digest(x) == batch_digest(x.t().contiguous().t())
    assert batch_digest(x) == batch_digest(x.clone().requires_grad_())


def test_what_is_not_read_is_named() -> None:
    batch = {"x": torch.ones(2), "y": torch.empty(2, device="meta"), "z": [Opaque(), len]}
    digest = batch_digest(batch)
    assert digest.omitted == (
        "batch['y']: on meta",
        "batch['z'][0]: a Opaque, whose values cannot be read",
        "batch['z'][1]: code of builtin_function_or_method",
    )
    batch["y"] = torch.empty(3, device="meta")
    assert batch_digest(batch).text != digest.text
    loop: list[Any] = []
    loop.append(loop)
    assert batch_digest(loop).omitted == ("batch[0]: contains itself",)


def test_another_process_finds_the_same() -> None:
    batch = [{"b", "a"}, {"t": torch.arange(5.0)}, "x" * 3, frozenset({("c", 1)})]
    program = (
        "import torch; from actckpt.resuming.batch_digest import batch_digest as d; "
        "batch = [{'b', 'a'}, {'t': torch.arange(5.0)}, 'x' * 3, frozenset({('c', 1)})]; "
        "print(d(batch).text)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == batch_digest(batch).text
