"""The few of many choices for one thing that a budget may call for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actckpt.policies.solver.packing import Choice

# of the choices for one thing, those that are best at some of these prices of a byte
_FEW = 12
_INSTANTS = 24
_SCALES = (0.03, 0.1, 0.2, 0.35, 0.6, 1.0, 1.8, 3.0, 6.0, 20.0)
_SHARES = (0.0, 0.3, 0.6, 0.9, 1.0)


def undominated(
    choices: Sequence[tuple[int, Choice]], tolerance_bytes: int = 0
) -> list[tuple[int, Choice]]:
    """Those that lower something, and for which no other one takes no more, is as fast and nowhere
    higher by more than the tolerance."""
    kept: list[tuple[int, Choice]] = []
    levels = np.empty((0, 0))
    for index, c in sorted(choices, key=lambda x: (x[1].time_s, len(x[1].takes), x[0])):
        delta = c.delta.whole()
        if delta.min(initial=0) >= 0:
            continue
        if kept:
            lower = (levels <= delta + tolerance_bytes).all(axis=1)
            if any(
                kept[j][1].takes <= c.takes and set(kept[j][1].holds) <= set(c.holds)
                for j in np.nonzero(lower)[0]
            ):
                continue
        kept.append((index, c))
        levels = delta[None] if len(kept) == 1 else np.concatenate([levels, delta[None]])
    return kept


def spread(choices: Sequence[tuple[int, Choice]], at: int) -> list[tuple[int, Choice]]:
    """Those that are the best at some price of a byte at ``at`` and at another instant each.

    Args:
        at: the instant at which nearly every budget binds: the end of the forward pass.
    """
    if len(choices) <= _FEW:
        return list(choices)
    alone = np.array([c.delta.whole() for _, c in choices], dtype=float)
    for row, (_, c) in zip(alone, choices, strict=True):
        for hold in c.holds:
            if not hold.saved:
                hold.added_to(row)
    best: set[int] = set()
    # with all that they hold, and with nothing of what others may hold for them
    for levels in (alone, np.array([c.delta.whole() for _, c in choices], dtype=float)):
        best.update(_best(levels, np.array([c.time_s for _, c in choices]), at))
    return [choices[j] for j in sorted(best)]


def _best(levels: np.ndarray, time_s: np.ndarray, at: int) -> set[int]:
    spans = levels.max(axis=0) - levels.min(axis=0)
    moved = np.nonzero(spans)[0]
    moved = moved[np.linspace(0, len(moved) - 1, _INSTANTS).astype(int)]
    slope = (time_s.max() - time_s.min()) / max(1.0, float(spans[at]))
    best: set[int] = set()
    for scale in _SCALES:
        for other in _SHARES:
            prices = scale * slope * ((1 - other) * levels[:, [at]] + other * levels[:, moved])
            best.update(np.argmin(time_s[:, None] + prices, axis=0).tolist())
    return best
