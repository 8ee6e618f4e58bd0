"""All that is to be known of a GPU, in one command and a few minutes: `make gpu`.

The CUDA tests first, then the models of `experiments.gpu`, those of which least is known before the
others. Every result is written as it comes, the whole ends within its minutes, and failures are
printed first. It runs from the checkout, with what is installed; what is missing is named.

    python -m experiments.gpu_campaign [--minutes 9] [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

# what the library itself needs, by the names it is imported by
NEEDED = ("torch", "numpy", "networkx", "scipy", "safetensors", "xxhash", "rich")
# Llama's and ViT's plans raised over a kernel's unwritten seed; ResNet-152's peak went over
MODELS = ("llama", "vit", "resnet152", "gpt2", "unet")
WITH_TRANSFORMERS = ("llama", "vit", "resnet152", "gpt2")
TESTS_SHARE = 0.3
# seconds for starting, and for ending what runs
RESERVE_S = 15.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu_campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything, at least 1")
    parser.add_argument("--quick", action="store_true", help="small models; also on the CPU")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args()
    begin = time.time()
    if options.minutes < 1:
        parser.error(f"--minutes must be at least 1; found {options.minutes}")
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"not installed, and needed: {', '.join(missing)}: pip install {' '.join(missing)}")
        return 2
    import torch

    if not torch.cuda.is_available() and not options.quick:
        print("torch finds no CUDA device here; --quick rehearses everything on the CPU")
        return 2

    from experiments.gpu.cases import read_rows
    from experiments.gpu.cuda_tests import run_cuda_tests
    from experiments.gpu.processes import ROUNDS, prepare, run_models
    from experiments.gpu.table import failures
    from experiments.results import FOLDER

    whole_s = 60 * options.minutes - RESERVE_S
    folder = options.out or (Path("runs/gpu") if options.quick else FOLDER)
    path = prepare(folder, options.quick)
    names, notes = list(MODELS), []
    if find_spec("transformers") is None:
        names = [name for name in names if name not in WITH_TRANSFORMERS]
        notes.append(f"transformers is not installed: without {', '.join(WITH_TRANSFORMERS)}")

    def said(text: str) -> None:
        print(f"{time.time() - begin:4.0f} s  {text}", flush=True)

    said(f"torch {torch.__version__}, {_device()}; tests, then {', '.join(names)}")
    tests = run_cuda_tests(path.with_name("gpu_tests.txt"), TESTS_SHARE * whole_s)
    said(f"CUDA tests: {tests}")
    end = begin + whole_s
    # the last third of a model's time is for its rounds
    until = end - (end - time.time()) / 3
    run_models(names, path, ROUNDS, until=until, end=end, done=said, tests=str(tests))
    found = [f"tests: {test}" for test in tests.failed]
    found += failures(read_rows(path)) + notes
    print("\n".join(["", "FAILED" if found else "Nothing failed.", *found, ""]))
    print(path.with_name("gpu.md").read_text(encoding="utf-8"))
    return 1 if found else 0


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    sys.exit(main())
