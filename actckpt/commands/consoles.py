"""Where commands print tables."""

from rich.console import Console

# of what is no terminal: no table is folded there
WIDTH = 120


def make_console() -> Console:
    """Standard output; as wide as the terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console
