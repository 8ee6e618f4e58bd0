"""llama.cpp, by the wheel of cyllama: what runs GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from actckpt.exporting.outputs import Inputs, Run
from actckpt.exporting.prepared import library

# of llama.cpp: a cache of float32, no flash attention (which computes in float16)
_FLOAT32 = 0
_NO_FLASH = 0


def llama_cpp(path: Path) -> Run:
    """What makes logits of token numbers, ``input_ids`` of shape [rows, tokens], on the CPU.

    Raises:
        WeightsExportError: cyllama is not installed.
    """
    cpp: Any = library("cyllama.llama.llama_cpp", "llama-cpp", "running a GGUF file")
    cpp.disable_logging()

    class Model(cpp.LlamaModel):  # type: ignore[misc] # untyped
        # its contexts ask for it, and 0.2.18 has left it out
        n_vocab = property(lambda self: self.get_vocab().n_vocab)

    how = cpp.LlamaModelParams()
    how.n_gpu_layers = 0
    # files are deleted while the process goes on
    how.use_mmap = False
    model = Model(str(path), how)

    def row(tokens: list[int]) -> np.ndarray[Any, Any]:
        how = cpp.LlamaContextParams()
        how.n_ctx = how.n_batch = how.n_ubatch = max(32, len(tokens))
        how.n_threads = how.n_threads_batch = 1
        how.type_k = how.type_v = _FLOAT32
        how.flash_attn_type = _NO_FLASH
        context = cpp.LlamaContext(model, how)
        batch = cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for place, token in enumerate(tokens):
            batch.add(token, place, [0], True)
        context.decode(batch)
        found = np.array([context.get_logits_ith(n) for n in range(len(tokens))], np.float32)
        context.close()
        return found

    def run(given: Inputs) -> torch.Tensor:
        rows = [row(tokens) for tokens in given["input_ids"].tolist()]
        return torch.from_numpy(np.stack(rows))

    return run
