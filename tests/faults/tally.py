"""The books: what was injected, what of it fired, what it broke."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


class Caught(Exception):
    """The first violation, where one is enough."""


@dataclass(slots=True)
class Tally:
    """Faults that were injected, those that fired, and what they broke.

    Args:
        name: of the faults.
        one_is_enough: `add` raises `Caught` for the first violation.
        missed: the faults that did not fire.
    """

    name: str
    one_is_enough: bool = False
    injected: int = 0
    fired: int = 0
    missed: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def add(self, fault: str, fired: int, wrong: Iterable[str]) -> None:
        """Enters one fault."""
        self.injected += 1
        self.fired += fired
        if not fired:
            self.missed.append(fault)
        self.broken(fault, wrong)

    def broken(self, fault: str, wrong: Iterable[str]) -> None:
        """Enters what a fault broke."""
        self.violations += [f"{self.name}, {fault}: {w}" for w in wrong]
        if self.violations and self.one_is_enough:
            raise Caught(self.violations[0])
