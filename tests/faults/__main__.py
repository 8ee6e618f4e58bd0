"""``python -m tests.faults [--whole] [--json FILE]``; exit status 1 if anything broke."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from tests.faults.killing import kill_at
from tests.faults.mutants import MUTANTS
from tests.faults.scans import BOUNDED, WHOLE, caught, run
from tests.faults.scene import scenes
from tests.faults.tally import Tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--whole", action="store_true", help="every fault; some minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the books there")
    args = parser.parse_args()
    # processes are forked: there must be no threads
    torch.set_num_threads(1)
    # what the library warns of here is meant to happen
    logging.disable(logging.CRITICAL)
    books, mutants = [], {}
    with scenes() as starts:
        for scene in starts:
            for tally in run(scene, WHOLE if args.whole else BOUNDED):
                books.append(tally)
                print(
                    f"{tally.name:32} {tally.injected:6} injected {tally.fired:6} fired "
                    f"{len(tally.violations):3} violations  {_now_s():6.1f} s",
                    flush=True,
                )
                for violation in tally.violations[:20]:
                    print("   ", violation)
        for name, mutant in MUTANTS.items():
            (scene,) = (s for s in starts if s.name == mutant.scene)
            mutants[name] = caught(scene, mutant)
            print(f"mutant {name}: {mutants[name] or 'GOT AWAY'}  {_now_s():6.1f} s", flush=True)
        beyond = Tally("a kill after the last call")
        kill_at(starts[1], [10_000], beyond)
    if args.json is not None:
        data = {
            "books": [asdict(tally) for tally in books],
            "mutants": mutants,
            "beyond": asdict(beyond),
        }
        args.json.write_text(json.dumps(data), encoding="utf-8")
    sound = all(t.fired == t.injected and not t.violations for t in books)
    caught_at = all(mutant.harm in mutants[name] for name, mutant in MUTANTS.items())
    return 0 if sound and caught_at else 1


def _now_s() -> float:
    """Seconds of the processor so far, those of ended children included."""
    times = os.times()
    return sum(times[:4])


if __name__ == "__main__":
    sys.exit(main())
