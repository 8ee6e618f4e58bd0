"""Bytes and seconds as text, and read from it; three digits, or in the unit that somebody uses."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

BYTE_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_SECONDS = {
    unit: seconds
    for seconds, units in (
        (1, "s sec secs second seconds"),
        (60, "m min mins minute minutes"),
        (3600, "h hr hrs hour hours"),
        (86400, "d day days"),
    )
    for unit in units.split()
}
_QUANTITY = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ByteUnit:
    """A unit in which somebody has named bytes, and is answered.

    Args:
        name: "GB".
        size_bytes: 10^9.
        written: whether it was written beside the number; else it is that of the argument.
    """

    name: str
    size_bytes: int
    written: bool = True

    def number(self, count: int, *, up: bool = False) -> str:
        """``count`` bytes in this unit: GB to the MB, and three digits where that says less.

        Args:
            up: rounded up, for what has to be enough.
        """
        return self._digits(count, self._decimals(count), up=up)

    def text(self, count: int) -> str:
        """The same with the unit: ``1.250 GB``."""
        return f"{self.number(count)} {self.name}"

    def argument(self, count: int) -> str:
        """What to pass for so many bytes, rounded up: ``1.250``, or ``'1250.0MB'``."""
        number = self.number(count, up=True)
        return f"'{number}{self.name}'" if self.written else number

    def split(self, total: int, parts: Collection[int]) -> list[str]:
        """Parts as `number` shows their total, rounded so that they add up to it.

        Args:
            parts: bytes, which sum to ``total``.
        """
        decimals = self._decimals(total)
        scaled = [size * 10**decimals for size in parts]
        units = [size // self.size_bytes for size in scaled]
        left = round(Fraction(total * 10**decimals, self.size_bytes)) - sum(units)
        # those that lose most by rounding down are rounded up
        lost = [size % self.size_bytes for size in scaled]
        for n in sorted(range(len(units)), key=lambda n: -lost[n])[:left]:
            units[n] += 1
        return [_decimal(n, decimals) for n in units]

    def exactly(self, count: int) -> str:
        """``count`` bytes as a size that `parse_bytes` reads as the same: ``0.9MB``."""
        decimals = _decimals_of(self.size_bytes)
        number = _decimal(count * 10**decimals // self.size_bytes, decimals)
        return f"{number.rstrip('0').rstrip('.') if decimals else number}{self.name}"

    def _digits(self, count: int, decimals: int, *, up: bool) -> str:
        scaled = Fraction(count * 10**decimals, self.size_bytes)
        return _decimal(math.ceil(scaled) if up else round(scaled), decimals)

    def _decimals(self, count: int) -> int:
        most = _decimals_of(self.size_bytes)
        least = (len(str(self.size_bytes)) - 1) // 3
        if not count:
            return min(least, most)
        return min(max(least, len(str(self.size_bytes)) + 2 - len(str(abs(count)))), most)


def _decimals_of(size_bytes: int) -> int:
    """After which a size of whole bytes has no more."""
    return (size_bytes & -size_bytes).bit_length() - 1  # of 10^n and of 2^n, n


def _decimal(scaled: int, decimals: int) -> str:
    """``scaled`` / 10^decimals, written out."""
    if not decimals:
        return str(scaled)
    digits = str(abs(scaled)).rjust(decimals + 1, "0")
    sign = "-" if scaled < 0 else ""
    return f"{sign}{digits[:-decimals]}.{digits[-decimals:]}"


GIGABYTES = ByteUnit("GB", 10**9, written=False)


def unit_of(asked: object) -> ByteUnit:
    """The unit of a budget: as it was written, else GB.

    Args:
        asked: a size that `parse_bytes` reads, or anything else.
    """
    match = _QUANTITY.fullmatch(asked) if isinstance(asked, str) else None
    written = match[2].lower() if match else ""
    for name, size_bytes in BYTE_UNITS.items():
        if name.lower() == written:
            return ByteUnit(name.replace("KB", "kB"), size_bytes)
    return GIGABYTES


def parse_bytes(text: str) -> int:
    """The bytes that a size stands for, rounded down.

    Args:
        text: a positive number with a unit (``8GiB``, ``8GB``, ``500 MB``; B, KB..TB of 1000,
            KiB..TiB of 1024, in any case), or alone, in GB of 10^9 bytes.

    Raises:
        ValueError: anything else.
    """
    match = _QUANTITY.fullmatch(text)
    units = {unit.lower(): size for unit, size in BYTE_UNITS.items()}
    size = units.get(match[2].lower() or "gb") if match else None
    if match is None or size is None:
        raise ValueError(
            f"{text!r} is not a size: expected a positive number of GB such as 16 or 0.5, "
            f"or a number with a unit ({', '.join(BYTE_UNITS)}) such as 8GiB or 500MB"
        )
    count = int(Fraction(match[1]) * size)
    if count == 0:
        raise ValueError(f"{text!r} is less than one byte: a budget must be positive")
    return count


def parse_seconds(text: str) -> float | None:
    """The seconds that a duration such as "30s", "10 minutes", "1.5h" or "1d" stands for.

    Returns:
        None where the text is none: a number and a unit of seconds, minutes, hours or days.
    """
    match = _QUANTITY.fullmatch(text)
    unit = _SECONDS.get(match[2].lower()) if match else None
    return None if match is None or unit is None else float(match[1]) * unit


def format_bytes(count: int | float) -> str:
    """``count`` as B, kB, MB, GB or TB of powers of 1000, such as ``1.25 GB``."""
    return _scaled(float(count), (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def format_change(before: int, after: int) -> str:
    """Two byte counts in the unit of the larger one, such as ``6.70 → 5.30 GB``."""
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, size = next((u for u in units if max(before, after) >= 0.9995 * u[1]), ("B", 1.0))
    digits = _three_digits if size > 1 else lambda x: f"{x:.0f}"
    return f"{digits(before / size)} → {digits(after / size)} {unit}"


def format_seconds(duration_s: float) -> str:
    """``duration_s`` as min, s, ms or µs, such as ``12.5 ms``."""
    if abs(duration_s) >= 600:
        return f"{duration_s / 60:.3g} min"
    if abs(duration_s) < 1e-9:
        return "0 s"
    return _scaled(duration_s, (("s", 1.0), ("ms", 1e-3)), "µs", 1e-6)


def format_percent(ratio: float) -> str:
    """A signed percentage with one decimal, such as ``+12.5 %``."""
    return f"{100 * ratio:+.1f} %".replace("-", "−")


def _scaled(
    value: float, units: tuple[tuple[str, float], ...], smallest: str, scale: float = 1.0
) -> str:
    for unit, size in units:
        # 999.7 MB rounds to 1000 MB, which reads better as 1.00 GB
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)} {unit}"
    value /= scale
    return (
        f"{value:.0f} {smallest}" if value == int(value) else f"{_three_digits(value)} {smallest}"
    )


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    decimals = 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{value:.{decimals}f}"
