#!/usr/bin/env bash
# A job that torchrun starts again meets what its ranks said before they died, and dials the dead.
#
# Guess, before running: with --max-restarts=1 a gloo job of two ranks, one of which dies in the
# first attempt, founds its process group anew in the second: torchrun makes a new store for every
# attempt, as a comment in torch/distributed/rendezvous.py says.
#
# Seen: all attempts have one store, at one port, and nothing tells their keys apart. In the second
# attempt one rank reads the address that the other one had in the first, and cannot connect; the
# job fails. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 the port is another one, and the job ends.
# Whatever else reads keys of the default store has to expect those of an earlier attempt.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/ranks.py" <<'PYTHON'
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
print(f"attempt {attempt} port {os.environ['MASTER_PORT']}", flush=True)
dist.init_process_group("gloo", timeout=timedelta(seconds=30))
dist.all_reduce(torch.ones(1))
if attempt == "0":
    sys.exit(3 * dist.get_rank())
print("ended well", flush=True)
dist.destroy_process_group()
PYTHON
tried() {
  env "$@" OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --standalone \
    --nproc-per-node=2 --max-restarts=1 "$folder/ranks.py" > "$folder/out" 2>&1 || true
  echo "ports: $(grep -o 'port [0-9]*' "$folder/out" | sort -u | wc -l)," \
    "ranks that ended well: $(grep -c 'ended well' "$folder/out" || true)," \
    "refused: $(grep -c 'connectFullMesh failed.*refused' "$folder/out" | sed 's/[1-9][0-9]*/yes/')"
}
"$folder/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
shared=$(tried A=1)
apart=$(tried TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
echo "as it comes: $shared"
echo "not shared: $apart"
[[ "$shared" == "ports: 1, ranks that ended well: 0, refused: yes" ]]
[[ "$apart" == "ports: 2, ranks that ended well: 2, refused: 0" ]]
# output seen:
# torch 2.13.0+cpu
# as it comes: ports: 1, ranks that ended well: 0, refused: yes
# not shared: ports: 2, ranks that ended well: 2, refused: 0
