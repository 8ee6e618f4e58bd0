"""What a budget that is none is answered with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import actckpt
from actckpt.data.budget_error import BudgetError
from tests.models.blocks import chain, rows

SAID: dict[str, tuple[Any, list[str]]] = {
    "bytes": (8e9, ["8e9 GB", "GB of 10^9 bytes", "Did you mean 8?"]),
    "bytes, of 2^30": (8 * 2**30, ["8.58993e9 GB", "Did you mean 8.59?"]),
    "bytes, as a text": ("8000000000", ["'8000000000'", "8e9 GB", "Did you mean 8?"]),
    "another unit": ("8 parsec", ["'8 parsec' is not a size", "8GiB or 500MB", "'80%'"]),
    "nothing of the device": ("0%", ["'0%'", "more than 0% and at most 100%"]),
    "more than the device": ("120%", ["'120%'", "more than 0% and at most 100%"]),
    "a list": ([8], ["[8]", "a number of GB", "'8GB'", "'80%'"]),
    "a flag": (True, ["True", "a number of GB"]),
    "not a number": (float("nan"), ["positive and finite", "nan"]),
    "complex": (8j, ["8j", "a number of GB"]),
}


@pytest.mark.parametrize("name", SAID)
def test_what_no_budget_is_answered_with(name: str) -> None:
    asked, parts = SAID[name]
    model = chain(2)()
    before = [dict(m.__dict__) for m in model.modules()]
    found: list[str] = []
    for refused in (
        lambda: actckpt.optimize(model, asked),
        lambda: actckpt.find_max_batch(model, asked, rows),
    ):
        with pytest.raises(BudgetError) as caught:
            refused()
        found.append(str(caught.value))
    assert found[0] == found[1]
    for part in parts:
        assert part in found[0]
    assert len(found[0].splitlines()) == 1
    assert [dict(m.__dict__) for m in model.modules()] == before


def test_a_share_of_a_device_that_holds_no_memory() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(4, 4)
    with pytest.raises(actckpt.ActckptError, match="meta"):
        actckpt.optimize(model, "80%")
