"""Plans made and run on a CUDA device: peaks, times, gradients, buffers beside the predicted ones.

Every model runs in a process of its own; its arms share weights and optimizer, and take turns.
Beside them torch.utils.checkpoint on every block, our plan at its measured peak, and the plan that
`actckpt plan --device` makes from the data sheet. Without CUDA, `--quick` tries it on the CPU.

    python -m experiments.gpu [MODEL ...] [--quick] [--rounds N] [--seconds N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from experiments.arguments import add_models
from experiments.gpu.processes import ROUNDS, prepare, run_models
from experiments.gpu.subjects import MODELS
from experiments.progress import progress
from experiments.results import FOLDER


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu", description=__doc__)
    add_models(parser, MODELS)
    parser.add_argument("--quick", action="store_true", help="small models; also on the CPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds, at least 2")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="for plans, about; shared among models"
    )
    parser.add_argument("--out", type=Path, help=f"folder of gpu.jsonl and gpu.md; else {FOLDER}")
    options = parser.parse_args()
    path = prepare(options.out or (Path("runs/gpu") if options.quick else FOLDER), options.quick)
    names = options.models or list(MODELS)
    with progress(len(names), "models") as done:
        run_models(
            names,
            path,
            options.rounds,
            until=time.time() + options.seconds,
            end=math.inf,
            done=done,
        )


if __name__ == "__main__":
    main()
