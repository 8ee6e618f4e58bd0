"""Make docs/measured.md and README's table anew: `python -m experiments.measured`.

With `--check` nothing is written; the exit status is 1 where they are not what the results say.
"""

from __future__ import annotations

import argparse
import sys

from experiments.measured.page import PAGE, README, page, readme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = 0
    for path, text in ((PAGE, page()), (README, readme(README.read_text(encoding="utf-8")))):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if before == text:
            continue
        stale = 1
        if not check:
            path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {'is not what the results say' if check else 'written'}")
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main())
