"""What a budget asks for, in bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from actckpt.data.budget_error import BudgetError
from actckpt.units import parse_bytes

# a petabyte: no device has it, and whoever counts in bytes is above it from a megabyte on
_NO_DEVICE_HAS_BYTES = 10**15
_PERCENT = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*")


class Left(str):
    """A size, as `budget_bytes` reads it: what a budget leaves to a model.

    Attributes:
        beside_bytes: that were taken off, for what lies beside the model.
    """

    beside_bytes: int

    def __new__(cls, size: str, beside_bytes: int) -> Left:
        found = super().__new__(cls, size)
        found.beside_bytes = beside_bytes
        return found


def budget_bytes(asked: object, memory_bytes: Callable[[], int]) -> int:
    """The bytes that ``budget_gb`` stands for.

    Args:
        asked: a number of GB (10^9 bytes), a size ("8GB", "8GiB", "512MB"), or a share of the
            device's memory ("80%").
        memory_bytes: of the device; called where a share is asked for.

    Raises:
        BudgetError: it is none of these, or no device has as much.
    """
    if isinstance(asked, str):
        percent = _PERCENT.fullmatch(asked)
        if percent is not None:
            return _share_bytes(asked, Fraction(percent[1]), memory_bytes)
        try:
            count = parse_bytes(asked)
        except ValueError as error:
            raise BudgetError(f"budget_gb={error}, or '80%' of what the device has") from error
    elif isinstance(asked, (int, float, np.integer, np.floating)) and not isinstance(asked, bool):
        if not math.isfinite(asked) or asked <= 0:
            raise BudgetError(f"budget_gb must be positive and finite; found {asked!r}")
        count = round(float(asked) * 1e9)
    else:
        raise BudgetError(
            "budget_gb must be a number of GB (10^9 bytes), a size such as '8GB', '8GiB' or "
            f"'512MB', or a share of the device's memory such as '80%'; found {asked!r}"
        )
    if count >= _NO_DEVICE_HAS_BYTES:
        raise BudgetError(
            f"budget_gb={asked!r} is {_short(count / 1e9)} GB, and no device has as much: "
            "budget_gb counts in GB of 10^9 bytes, not in bytes. "
            f"Did you mean {count / 1e18:.3g}?",
            budget_bytes=count,
        )
    return count


def _share_bytes(asked: str, percent: Fraction, memory_bytes: Callable[[], int]) -> int:
    if not 0 < percent <= 100:
        raise BudgetError(
            f"budget_gb={asked!r} must be more than 0% and at most 100% of the device's memory"
        )
    return int(percent * memory_bytes() / 100)


def _short(number: float) -> str:
    """``8e9``, not ``8e+09``."""
    return re.sub(r"e\+0*", "e", f"{number:g}")
