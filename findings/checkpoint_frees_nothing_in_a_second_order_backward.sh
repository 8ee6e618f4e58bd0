#!/usr/bin/env bash
# torch.utils.checkpoint saves hardly any memory where the gradient itself is differentiated.
#
# Guess, before running: with use_reentrant=False the recomputed tensors go as their nodes finish, in
# a backward with create_graph=True as in any other, and are computed once more for the second one.
# So a Hessian-vector product under checkpointing peaks about as far below the plain one as a
# gradient does.
#
# Seen: the nodes of the second backward save the tensors that the first one's nodes have unpacked,
# and nothing packs those again: all of them stay until the second backward. The gradient's peak falls
# to half; the Hessian-vector product's is no lower than without checkpointing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/peaks.py" <<'PYTHON'
import sys
import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint


class Peak(TorchDispatchMode):
    """The most bytes that storages made meanwhile hold at once."""

    def __init__(self):
        super().__init__()
        self.level = self.peak = 0
        self.seen = weakref.WeakSet()

    def _gone(self, size):
        self.level -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    self.seen.add(storage)
                    self.level += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.level)
        return out


def peak(checkpointed, second):
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh())
        for _ in range(6)
    )
    parameters = list(blocks.parameters())
    x = torch.randn(1024, 64)
    with Peak() as mode:
        h = x
        for block in blocks:
            h = checkpoint(block, h, use_reentrant=False) if checkpointed else block(h)
        loss = h.square().mean()
        grads = torch.autograd.grad(loss, parameters, create_graph=second)
        if second:
            product = sum((g * torch.ones_like(g)).sum() for g in grads)
            torch.autograd.grad(product, parameters)
    return mode.peak


print("torch", torch.__version__)
first = peak(True, False) / peak(False, False)
second = peak(True, True) / peak(False, True)
print(f"checkpointed over plain: gradient {first:.2f}, Hessian-vector product {second:.2f}")
sys.exit(not (first < 0.75 and second > 0.95))
PYTHON
"$folder/venv/bin/python" "$folder/peaks.py"
# output seen:
# torch 2.13.0+cpu
# checkpointed over plain: gradient 0.52, Hessian-vector product 1.05
