"""Names on a command line: one clear error for those that there are not."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable


def among(what: str, names: Iterable[str]) -> Callable[[str], str]:
    """An argument's type: one of some names; ``what`` they are, for the error."""
    known = tuple(names)

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"no {what} {text!r}; there are {', '.join(known)}")
        return text

    return parse


def several(what: str, names: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """An argument's type: some of the names, separated by commas."""
    one = among(what, names)
    return lambda text: tuple(map(one, text.split(",")))


def add_models(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Lets models be named; ``options.models`` is empty if none is."""
    known = tuple(names)
    parser.add_argument(
        "models",
        nargs="*",
        type=among("model", known),
        metavar="MODEL",
        help=f"of {', '.join(known)}",
    )
