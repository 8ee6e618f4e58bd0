"""How much memory a device has for this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from actckpt.data.budget_error import BudgetError

# where a control group's limit stands, by the type of its file system
_LIMIT_FILES = {"cgroup2": "memory.max", "cgroup": "memory.limit_in_bytes"}


def memory_bytes(device: str) -> int:
    """Bytes of memory that a device has in all.

    Of a CPU the smallest limit of the control groups that this process is in, as containers and
    batch systems set it, or the machine's physical memory where there is none below that.

    Raises:
        BudgetError: it is not known for this kind of device.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if kind == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min([physical, *limits_bytes()])
    raise BudgetError(
        f"how much memory {device} has is not known on this system: give the budget in GB "
        "(8, or '8GB'), not in percent"
    )


def limits_bytes(root: Path = Path("/")) -> Iterator[int]:
    """The memory limits of every control group, of version 1 and 2, that holds this process.

    Args:
        root: what paths begin at; the tests' stand-in for the file system.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return  # no Linux
    # version 2 lists no controllers: "0::/path"; version 1 lists them: "4:memory:/path"
    paths = {controllers: path for _, controllers, path in (g.split(":", 2) for g in groups)}
    for mount in mounts:
        fields, _, rest = mount.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind == "cgroup2":
            path = paths.get("")
        elif kind == "cgroup" and "memory" in options.split(","):
            path = next((p for c, p in paths.items() if "memory" in c.split(",")), None)
        else:
            continue
        if path is not None:
            at, mounted_at = (_unescaped(f) for f in fields.split(" ")[3:5])
            yield from _up_to(root / mounted_at.lstrip("/"), at, path, _LIMIT_FILES[kind])


def _up_to(top: Path, at: str, path: str, name: str) -> Iterator[int]:
    """The limits from a group up to what is mounted: any of them may be the smallest.

    Args:
        at: the group that is mounted at ``top``; a container sees a part of the tree, or, in a
            namespace of its own, paths that lead out of it ("/../..").
    """
    group = PurePosixPath(path)
    inside = group.is_relative_to(at) and ".." not in group.parts
    folder = top / group.relative_to(at) if inside else top
    while True:
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            text = "max"  # the root group has no limit, and no file that says so
        if text != "max":
            yield int(text)
        if folder == top:
            return
        folder = folder.parent


def _unescaped(field: str) -> str:
    """A path as mountinfo writes it: blanks are ``\\040``."""
    return field.encode().decode("unicode_escape") if "\\" in field else field
