#!/usr/bin/env bash
# Whether torch.onnx.export(dynamo=True) exports a model depends on whether gradients are enabled.
#
# Guess, before running: an ONNX file is for inference, and a graph is made of the model in
# evaluation mode whether or not the call stands under torch.no_grad(). So a T5 whose forward
# runs is exported in both cases, or in neither.
#
# Seen: with gradients enabled, as they are by default, the export fails while the graph is
# decomposed, at a view of what attention returned, for strides that do not allow it. Under
# torch.no_grad() the same call exports; so it does where no parameter requires a gradient, or with
# the attention implementation "eager".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5" "transformers==5.23.0" \
  "onnx==1.23.2" "onnxscript==0.7.2"
cat > "$folder/export.py" <<'PYTHON'
import logging
import sys
import warnings

import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
transformers.logging.set_verbosity_error()
size = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
config = T5Config(decoder_start_token_id=0, use_cache=False, **size)
model = T5ForConditionalGeneration(config).eval()
tokens = torch.arange(10).reshape(2, 5) + 3
inputs = {"input_ids": tokens, "decoder_input_ids": tokens.clone()}


def exported(gradients):
    with torch.set_grad_enabled(gradients):
        try:
            torch.onnx.export(model, kwargs=dict(inputs), dynamo=True, verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:
            return str(error.__cause__ or error).strip().splitlines()[0]
    return "exported"


print("torch", torch.__version__, "transformers", transformers.__version__)
enabled, disabled = exported(True), exported(False)
model.requires_grad_(False)
frozen = exported(True)
model.requires_grad_(True)
model.set_attn_implementation("eager")
eager = exported(True)
print("gradients enabled:", enabled[:80])
print("under no_grad:", disabled)
print("gradients enabled, no parameter wants one:", frozen)
print("gradients enabled, attention eager and not sdpa:", eager)
sys.exit(not ("Cannot view a tensor" in enabled and {disabled, frozen, eager} == {"exported"}))
PYTHON
"$folder/venv/bin/python" "$folder/export.py"
# output seen:
# torch 2.13.0+cpu transformers 5.23.0
# gradients enabled: Cannot view a tensor with shape torch.Size([2, 5, 2, 8]) and strides (80, 8, 40,
# under no_grad: exported
# gradients enabled, no parameter wants one: exported
# gradients enabled, attention eager and not sdpa: exported
