#!/usr/bin/env bash
# What a dispatch mode's handler calls is hidden from function modes, but not in a TorchScript module.
#
# Guess, before running: a function mode sees what the model's Python calls. What the handler of a
# dispatch mode beneath it calls for itself is seen by no function mode, whoever called the model:
# the handler runs while the mode's own is open, and modes do not see what their handlers do.
#
# Seen: so it is in eager mode. The interpreter of a scripted module calls operations without going
# through a function mode, which therefore is open when the dispatch handler runs, and sees every
# call that the handler makes for itself. A tracer of two modes takes those for the model's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/modes.py" <<'PYTHON'
import sys
import warnings

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

warnings.simplefilter("ignore")


class Functions(TorchFunctionMode):
    """Names of the torch functions that Python calls."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Makes a tensor of its own at every operation, as a meter or a tracer does."""

    def __init__(self):
        super().__init__()
        self.handled = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.handled += 1
        torch.zeros(1)
        return func(*args, **(kwargs or {}))


def zeros_seen(model):
    """(operations handled, how many of the handler's own calls the function mode saw)."""
    x = torch.randn(3, 4)
    with torch.no_grad(), Operations() as operations, Functions() as functions:
        model(x)
    return operations.handled, functions.called.count("zeros")


model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
scripted = torch.jit.script(model)
scripted(torch.randn(3, 4))
for name, one in (("eager", model), ("scripted", scripted)):
    handled, seen = zeros_seen(one)
    print(f"torch {torch.__version__.split('+')[0]}, {name}: {handled} operations handled, "
          f"{seen} calls of the handler seen by the function mode")
    if handled == 0 or seen != (0 if name == "eager" else handled):
        sys.exit("this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/modes.py"
# torch 2.13.0, eager: 3 operations handled, 0 calls of the handler seen by the function mode
# torch 2.13.0, scripted: 9 operations handled, 9 calls of the handler seen by the function mode
