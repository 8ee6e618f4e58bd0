"""What is known of a plan in force, as plain data: predicted, measured, and where the bytes are."""

from __future__ import annotations

from dataclasses import dataclass, field

from actckpt.data.plan import Plan
from actckpt.reporting.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Figures:
    """Peak memory and duration of one training step.

    Args:
        added_bytes: the peak above parameters, buffers, gradients, optimizer state and batch: what
            ``scope="activations"`` bounds. None where it is not known.
    """

    peak_bytes: int
    step_s: float
    added_bytes: int | None = None

    def bounded_bytes(self, scope: str) -> int | None:
        """What a budget of that scope is compared with."""
        return self.added_bytes if scope == "activations" else self.peak_bytes


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the step. ``measured`` is None until steps were measured."""

    predicted: Figures
    measured: Figures | None = None

    @property
    def best(self) -> Figures:
        """The measured figures, or the predicted ones until there are measured ones."""
        return self.measured or self.predicted

    @property
    def peak_bytes(self) -> int:
        """The measured peak, or the predicted one until there is a measured one."""
        return self.best.peak_bytes

    @property
    def step_s(self) -> float:
        """The measured step time, or the predicted one until there is a measured one."""
        return self.best.step_s


@dataclass(frozen=True, slots=True)
class RegionRow:
    """One region or burst: what stays for it, what is dropped, operations that run again."""

    label: str
    ops: int
    saved_bytes: int
    dropped_bytes: int
    recompute_s: float
    depth: int


@dataclass(frozen=True, slots=True)
class OpRow:
    """All calls of one operation whose outputs backward needs.

    ``state`` is "saved", "recomputed" or "mixed"; ``bytes`` and ``seconds`` are sums over calls.
    """

    name: str
    count: int
    state: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PeakRow:
    """Alike allocations at the planned step's predicted peak, which all rows add up to.

    Args:
        op: the operation that made them, and ``where`` as of `Living`; "" for what is no activation
            and for scratch inside kernels.
        state: "saved" (by autograd, for backward), "held" (a recomputation begins from it, or the
            forward returned it), "recomputed", "in use", or what else it is: "parameters",
            "gradients", "workspace", ...
        recompute_s: of what is saved and could be recomputed: what the operations that made it
            take, the least that this would add to a step. None where it cannot be.
    """

    op: str
    where: str
    state: str
    count: int
    bytes: int
    recompute_s: float | None


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a plan in force: the fields of a `Report`, which says what each is."""

    policy: str
    plan: Plan
    budget_bytes: int | None
    scope: str
    baseline: Arm
    planned: Arm
    timeline: Timeline = field(default_factory=Timeline)
    regions: tuple[RegionRow, ...] = ()
    ops: tuple[OpRow, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    lower_bound: float | None = None
    lower_bound_of_kind: float | None = None
    certificate: str = ""
    model: str = ""
    at_peak: tuple[PeakRow, ...] = ()

    @property
    def gap(self) -> float | None:
        """Percentage points of step time between the predicted overhead and the lower bound."""
        return self._points_above(self.lower_bound)

    @property
    def gap_of_kind(self) -> float | None:
        """The same above what no plan of its kind can beat: what a better planner could gain."""
        return self._points_above(self.lower_bound_of_kind)

    def _points_above(self, bound: float | None) -> float | None:
        if bound is None or not self.baseline.predicted.step_s:
            return None
        predicted = self.planned.predicted.step_s / self.baseline.predicted.step_s - 1
        return 100 * (predicted - bound)

    @property
    def overhead(self) -> float:
        """Planned over baseline step time, minus 1: measured where both were, else predicted."""
        baseline, planned = self.compared
        return planned.step_s / baseline.step_s - 1 if baseline.step_s else 0.0

    @property
    def overhead_measured(self) -> bool:
        """Whether `overhead` compares measured steps."""
        return self.baseline.measured is not None and self.planned.measured is not None

    @property
    def compared(self) -> tuple[Figures, Figures]:
        """(untouched, planned) from one source: measured where both were, else predicted."""
        if self.baseline.measured is not None and self.planned.measured is not None:
            return self.baseline.measured, self.planned.measured
        return self.baseline.predicted, self.planned.predicted
