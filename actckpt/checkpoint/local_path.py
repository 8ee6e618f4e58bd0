"""Where checkpoints lie: in a folder of this machine."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from actckpt.errors import ArgumentError

# a path swallows the second slash; one letter before the colon is a drive
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.IGNORECASE | re.DOTALL)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a URL."""
    text = os.fspath(path)
    return isinstance(text, str) and _URL.fullmatch(text) is not None


def local_path(path: str | os.PathLike[str]) -> Path:
    """``path`` as it is.

    Raises:
        ArgumentError: it is a URL.
    """
    text = os.fspath(path)
    found = _URL.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        return Path(path)
    scheme, rest = found[1], found[2]
    works = (
        f"pass the path, /{rest}"
        if scheme.lower() == "file"
        else "pass a path on a disk or a mounted share, and the URL as one of tiers="
    )
    shown = text if "://" in text else f"{scheme}://{rest}"
    raise ArgumentError(
        f"{shown} is a URL, and checkpoints are read and written in folders of this "
        f"machine: {works}. (A folder of this very name is ./{scheme}:/{rest})"
    )


def refuse_file(path: Path) -> None:
    """A place where no folder can be made.

    Args:
        path: absolute.

    Raises:
        ArgumentError: there is a file in the place of the folder, or of one that it lies in.
    """
    for folder in (path, *path.parents):
        try:
            # one look: another rank may make the folder between two
            mode = os.stat(folder).st_mode
        except (OSError, ValueError):
            continue  # there is nothing, or it says later what is wrong with it
        if stat.S_ISDIR(mode):
            return
        inside = "" if folder == path else f", which {path} would lie in"
        raise ArgumentError(
            f"{folder} is a file{inside}: a Checkpointer needs a folder of its own, which it "
            "makes where there is none; choose another name, or move the file away"
        )
