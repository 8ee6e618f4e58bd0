#!/usr/bin/env bash
# PeftModel.unload() does not give back the model that get_peft_model was given.
#
# Guess, before running: unload() takes off all that PEFT put there, without merging; so the weights
# it leaves are those of before training, under the same names and bit for bit: of the layers that
# LoRA wrapped and of those in modules_to_save, whose originals PEFT has kept for that.
#
# Seen: what LoRA wrapped is itself again, bit for bit. A module in modules_to_save is not: the
# copy that was trained takes its place, under the original's names. The original was there until
# then, and is what disable_adapter() computes with, but is not in what is returned: whoever wants
# the base model back takes original_module of each wrapper before unload().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5" \
  "transformers==5.23.0" "peft==0.21.2"
cat > "$folder/unload.py" <<'PYTHON'
import sys

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
x = torch.randn(8, 4)
base = model(x)
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
optimizer = torch.optim.SGD((p for p in tuned.parameters() if p.requires_grad), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    tuned(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()

kept = tuned.base_model.model[2].original_module.weight
print("peft", peft.__version__, "torch", torch.__version__)
with tuned.disable_adapter():
    disabled = tuned(x)
there = torch.equal(kept, before["2.weight"])
print("before unload() the original is there:", there)
print("and disable_adapter() computes as the base model:", torch.equal(disabled, base))
after = tuned.unload()
state = after.state_dict()
print("after unload() the same names:", list(state) == list(before))
changed = [name for name in before if not torch.equal(state[name], before[name])]
print("weights that are not those of the base model:", changed)
sys.exit(not (there and torch.equal(disabled, base) and changed == ["2.weight", "2.bias"]))
PYTHON
"$folder/venv/bin/python" "$folder/unload.py"
# output seen:
# peft 0.21.2 torch 2.13.0+cpu
# before unload() the original is there: True
# and disable_adapter() computes as the base model: True
# after unload() the same names: True
# weights that are not those of the base model: ['2.weight', '2.bias']
