"""Bytes and seconds as text: three significant digits, powers of ten."""

from __future__ import annotations

from collections.abc import Collection


def format_bytes(count: int | float) -> str:
    """``count`` as B, kB, MB, GB or TB of powers of 1000, such as ``1.25 GB``."""
    return _scaled(float(count), (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def format_gigabytes(count: int, *, up: bool = False) -> str:
    """``count`` bytes as a number of GB: to the MB, and to three digits where that says less.

    Args:
        up: rounded up, for what has to be enough.
    """
    digits, unit = _decimals(count)
    rounded = -(-count // unit) if up else round(count / unit)
    return f"{rounded * unit / 1e9:.{digits}f}"


def split_gigabytes(total: int, parts: Collection[int]) -> list[str]:
    """Parts as `format_gigabytes` shows their total, rounded so that they add up to it.

    Args:
        parts: bytes, which sum to ``total``.
    """
    digits, unit = _decimals(total)
    units = [size // unit for size in parts]
    left = round(total / unit) - sum(units)
    # those that lose most by rounding down are rounded up
    lost = [size % unit for size in parts]
    for n in sorted(range(len(units)), key=lambda n: -lost[n])[:left]:
        units[n] += 1
    return [f"{n * unit / 1e9:.{digits}f}" for n in units]


def _decimals(count: int) -> tuple[int, int]:
    """How many decimals of a GB are shown, and bytes of the last."""
    digits = min(max(3, 12 - len(str(abs(count)))), 9)
    return digits, 10 ** (9 - digits)


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
