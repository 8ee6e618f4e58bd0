"""What became of the weights that were to be loaded."""

from __future__ import annotations

from dataclasses import dataclass

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """What `load_weights` did, by names of the model's own, in its order.

    Args:
        source: the file or folder.
        kind: what that is.
        loaded: tensors of the model that have new values.
        missing: those that kept theirs, because the file has none for them, and extra state.
        unexpected: names of the file that the model has nothing for.
        other_shape: (name, as stored, as in the model) of those that were left alone because of it.
        cast: (name, as stored, as in the model) of those that were loaded in another dtype.
        tied: names of one and the same tensor, which were loaded together.
        left_out: names of the file that ``names`` leaves out, or the model itself says to ignore.
        changed: those without values of their own that share memory with some that were loaded, and
            so are not what they were.
        not_run: modules whose hooks or own method for loading a state dict were not run.
        transposed: matrices of the model that were stored the other way round.
    """

    source: str
    kind: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    other_shape: tuple[tuple[str, str, str], ...] = ()
    cast: tuple[tuple[str, str, str], ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    left_out: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors from {self.source} ({self.kind})"]
        lines += _line("cast", [f"{name} {a} -> {b}" for name, a, b in self.cast])
        lines += _line("transposed", list(self.transposed))
        lines += _line("tied", [" = ".join(names) for names in self.tied])
        lines += _line("missing, kept as they were", list(self.missing))
        lines += _line(
            "of another shape, not loaded",
            [f"{name} {there}, the model's is {here}" for name, there, here in self.other_shape],
        )
        lines += _line("changed through others whose memory they share", list(self.changed))
        lines += _line("unexpected, not loaded", list(self.unexpected))
        lines += _line("own loading of modules, not run", list(self.not_run))
        lines += _line("left out", list(self.left_out))
        return "\n".join(lines)


def _line(what: str, found: list[str]) -> list[str]:
    return [f"{what} ({len(found)}): {some(found)}"] if found else []


def some(found: list[str]) -> str:
    """The first of a list, and how many more there are."""
    more = f", … and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
