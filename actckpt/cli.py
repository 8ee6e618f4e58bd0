"""The command line: ``actckpt plan``, ``compare``, ``demo``, ``checkpoint``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from actckpt.commands import checkpoint, compare, demo, plan
from actckpt.errors import ActckptError
from actckpt.versions import package_version


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 where a check of the command failed, or 2 for an error of the user's.

    Args:
        argv: the arguments after the program's name; those of the process if None.
    """
    args = make_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except ActckptError as error:
        print(f"actckpt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``run`` of its result is the command."""
    parser = argparse.ArgumentParser(
        prog="actckpt",
        description="Train a PyTorch model inside a memory budget.",
        epilog="example: actckpt plan gpt2 --batch-size 4 --budget-gb 3GB",
    )
    parser.add_argument("--version", action="version", version=f"actckpt {package_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (plan, compare, demo, checkpoint):
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
