"""What ranks read from storage of a checkpoint, over its size: worlds of 1, 2, 4, from 1, 2, 4.

Counted are bytes that the system's calls return from files inside the checkpoint, manifests too, of
all ranks together.

    python -m experiments.ranks_reading
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from experiments.results import circumstances, markdown_table, write_json_lines, write_markdown
from tests.ranked import launch
from tests.ranked_reading import KINDS, WORLDS


def rows(ranks: list[dict[str, int]]) -> list[dict[str, Any]]:
    """One for each checkpoint and each world that read it."""
    found = []
    for kind in KINDS:
        for saved in WORLDS:
            size_bytes = ranks[0][f"{kind} {saved}"]
            for world in WORLDS:
                read = [rank.get(f"{kind} {saved} {world}", 0) for rank in ranks]
                found.append(
                    {
                        "kind": kind,
                        "saved_by": saved,
                        "read_by": world,
                        "size_bytes": size_bytes,
                        "read_bytes": sum(read),
                        "most_by_one_bytes": max(read),
                    }
                )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Bytes read over size, in all and by the rank that read most."""
    head = ["saved by", "size", *(f"read by {world}" for world in WORLDS)]
    lines = []
    for kind in KINDS:
        for saved in WORLDS:
            of_it = [r for r in found if (r["kind"], r["saved_by"]) == (kind, saved)]
            cells = [
                f"{r['read_bytes'] / r['size_bytes']:.4f} "
                f"({r['most_by_one_bytes'] / r['size_bytes']:.2f})"
                for r in of_it
            ]
            size = f"{of_it[0]['size_bytes'] / 1e6:.1f} MB"
            lines.append([f"{saved} of {kind}", size, *cells])
    return markdown_table(head, lines)


def main() -> None:
    """The experiment."""
    with tempfile.TemporaryDirectory() as folder:
        found = rows(launch(Path(folder), "tests.ranked_reading", "all", max(WORLDS)))
    about = circumstances(
        {"torch": torch.__version__},
        read="bytes by all ranks over the size of the checkpoint; in brackets by one rank at most",
    )
    write_json_lines("ranks_reading", about, found)
    write_markdown("ranks_reading", about, "# Reading by many ranks", table(found))
    print(table(found), file=sys.stderr)


if __name__ == "__main__":
    main()
