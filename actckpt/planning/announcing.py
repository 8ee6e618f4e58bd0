"""The lines that say what was planned, and why again."""

from __future__ import annotations

import logging
import sys

from actckpt.planning.request import Planned, Request
from actckpt.units import format_bytes, format_change, format_seconds

logger = logging.getLogger("actckpt")


def announce(message: str) -> None:
    """Says something once: to the handlers of the log, or where there are none on standard error.

    Python shows warnings alone where nobody has set up logging, and whoever plans wants to know
    what it has come to. ``logging.getLogger("actckpt").setLevel("WARNING")`` silences it.
    """
    if logger.hasHandlers():
        logger.info("actckpt: %s", message)
    elif logger.level <= logging.INFO:
        sys.stderr.write(f"actckpt: {message}\n")


def announce_plan(planned: Planned, request: Request, duration_s: float) -> None:
    """``planned in 8.1 s: 6.70 → 5.30 GB, +9 %``: untouched peak, planned peak, predicted time."""
    if request.scope == "step":
        before, after = planned.untouched.peak_bytes, planned.dry.peak_bytes
    else:
        before, after = planned.untouched.added_bytes, planned.dry.added_bytes
    took = f"planned in {format_seconds(duration_s)}"
    if not (planned.plan.regions or planned.plan.bursts):
        announce(f"{took}: {format_bytes(after)}, nothing is recomputed")
        return
    overhead = (
        planned.price.time_s / planned.untouched.time_s - 1 if planned.untouched.time_s else 0
    )
    percent = f"{100 * overhead:+.0f} %"
    percent = percent.replace("-", "−")
    announce(f"{took}: {format_change(before, after)}, {percent}")
