#!/usr/bin/env bash
# Counting a compiled function's FLOPs once ends its compilation for the rest of the process.
#
# Guess, before running: under torch.utils.flop_counter.FlopCounterMode a function decorated with
# torch.compile runs as it is written for that one call (a dispatch mode has to see its operations),
# and compiled as ever in the calls after the mode.
#
# Seen: Dynamo marks the function's code as not to be compiled when it meets it under a dispatch
# mode, and never looks again. Three calls after the mode ran the compiled graph 0 times, without a
# word; with fullgraph=True those calls raise. What works: torch.compiler.set_stance("force_eager")
# while the mode is there; or torch.compiler.reset() afterwards, which forgets all that is compiled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/count.py" <<'PYTHON'
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

runs = 0


def backend(module, inputs):
    def run(*args):
        global runs
        runs += 1
        return module.forward(*args)

    return run


def compiled(**options):
    namespace = {}
    exec("def f(x):\n    return (x @ x).sin()\n", namespace)  # code of its own each time
    return torch.compile(namespace["f"], backend=backend, **options)


def calls_compiled(f):
    global runs
    runs = 0
    for _ in range(3):
        f(x)
    return runs


x = torch.randn(8, 8)
print("torch", torch.__version__)

never_counted = calls_compiled(compiled())

f = compiled()
with FlopCounterMode(display=False) as counter:
    f(x)
counted = calls_compiled(f)

g = compiled()
with FlopCounterMode(display=False), torch.compiler.set_stance("force_eager"):
    g(x)
counted_at_rest = calls_compiled(g)

h = compiled(fullgraph=True)
try:
    with FlopCounterMode(display=False):
        h(x)
except RuntimeError:
    pass
try:
    full_graph = calls_compiled(h)
except RuntimeError as error:
    full_graph = str(error).splitlines()[0]

print("FLOPs counted:", counter.get_total_flops())
print("of 3 calls compiled, never counted:", never_counted)
print("of 3 calls compiled, after counting once:", counted)
print("of 3 calls compiled, after counting once under force_eager:", counted_at_rest)
print("the same with fullgraph=True:", full_graph)
as_seen = never_counted == 3 and counted == 0 and counted_at_rest == 3 and full_graph != 3
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" "$folder/count.py"
