#!/usr/bin/env bash
# torch.distributed.checkpoint's writer of Hugging Face files saves no model with tied weights.
#
# Guess, before running: torch.distributed.checkpoint saves a state dict whose two names share one
# tensor, whatever the storage writer: HuggingFaceStorageWriter writes the tensor under both names,
# or under one. Should it refuse, then by an Exception, and before there is a file.
#
# Seen: FileSystemWriter saves the state dict, HuggingFaceStorageWriter does not. safetensors
# refuses tensors that share memory, and what surfaces is a CheckpointException, which is a
# BaseException: no "except Exception" catches it. The file was opened before, and stays behind
# with 0 bytes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5" "safetensors==0.8.0"
cat > "$folder/tied.py" <<'PYTHON'
import sys
import tempfile
import warnings
from pathlib import Path

import safetensors
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

warnings.simplefilter("ignore")
model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
model["head"].weight = model["embedding"].weight


def saved(kind):
    """(what was raised, {file: bytes})."""
    with tempfile.TemporaryDirectory() as folder:
        writer = kind(folder)
        raised = None
        try:
            dcp.save(model.state_dict(), storage_writer=writer, no_dist=True)
        except BaseException as error:
            raised = error
        return raised, {p.name: p.stat().st_size for p in sorted(Path(folder).iterdir())}


print("torch", torch.__version__, "safetensors", safetensors.__version__)
plain, files = saved(dcp.FileSystemWriter)
print("FileSystemWriter:", plain or "saved", list(files))
raised, files = saved(dcp.HuggingFaceStorageWriter)
print("HuggingFaceStorageWriter:", type(raised).__name__, files)
print("an Exception:", isinstance(raised, Exception))
said = [line.strip() for line in str(raised).splitlines() if "share memory" in line]
print("it says:", said[-1][:90] if said else raised)
as_seen = plain is None and isinstance(raised, dcp.CheckpointException) and said
sys.exit(not (as_seen and not isinstance(raised, Exception) and list(files.values()) == [0]))
PYTHON
"$folder/venv/bin/python" "$folder/tied.py"
# output seen:
# torch 2.13.0+cpu safetensors 0.8.0
# FileSystemWriter: saved ['.metadata', '__0_0.distcp']
# HuggingFaceStorageWriter: CheckpointException {'model-00001-of-00001.safetensors': 0}
# an Exception: False
# it says: Some tensors share memory, this will lead to duplicate memory on disk and potential differ
