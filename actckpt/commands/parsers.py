"""How every command is put before a person: what it does, each option's default, an example."""

from __future__ import annotations

import argparse
from typing import Any


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and examples line by line."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help  # nothing is set: what that means, the help says
        return super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = argparse.HelpFormatter._fill_text
        return text if text.startswith("example") else fill(self, text, width, indent)


def add_command(
    commands: Any, name: str, *, about: str, example: str, description: str = ""
) -> argparse.ArgumentParser:
    """The parser of a new command.

    Args:
        commands: the sub-parsers that it becomes one of.
        about: one line for the list of commands.
        example: one call, or several on a line each.
        description: sentences for the command's own help; else ``about``.
    """
    title = "examples" if "\n" in example else "example"
    lines = "\n".join(f"  {line}" for line in example.splitlines())
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=description or f"{about[0].upper()}{about[1:]}.",
        epilog=f"{title}:\n{lines}",
        formatter_class=_Help,
    )
    return parser
