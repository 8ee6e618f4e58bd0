"""Which weights travel in which format, and how far what a consumer computes is from the model.

    python -m experiments.weights_table [--out FOLDER]

Weights are scaled up, and two shapes run, for each format by whatever reads it: the safetensors and
transformers libraries, torch, peft, llama.cpp, ONNX Runtime.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from actckpt import WeightsExportError
from actckpt.exporting.drift import check_drift
from experiments.results import FOLDER, circumstances, markdown_table, write_markdown
from tests.travelling import TRAVELLERS, Traveller

GGUF = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "safetensors": ("safetensors", {}),
    "pt": ("pt", {}),
    "huggingface": ("huggingface", {}),
    "adapter": ("adapter", {}),
    "onnx": ("onnx", {}),
    **{f"gguf {kind}": ("gguf", {"quantization": kind}) for kind in GGUF},
}
# what nothing may reach: the deviation is what is asked for
ANY = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.weights_table")
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    refused: dict[str, None] = {}
    rows = []
    for name, traveller in TRAVELLERS.items():
        cells = [_cell(traveller, *made, refused) for made in FORMATS.values()]
        rows.append([name, *cells])
        print(*rows[-1], sep="\t", flush=True)
    about = circumstances(_versions())
    notes = "\n".join(f"- {text}" for text in refused)
    write_markdown(
        "weights_table",
        about,
        "# Weights in every format",
        "The largest deviation of an output, as a share of the largest, of matrices scaled up by "
        "8, at two shapes; 0 is bit for bit. Of quantized files beside a model of the rounded "
        "weights. What an adapter adds is scaled by 64, for it is a product.",
        markdown_table(["", *FORMATS], rows),
        f"Refused:\n\n{notes}",
        folder=args.out,
    )


def _cell(traveller: Traveller, format: str, options: dict[str, Any], refused: Any) -> str:
    more = dict(options)
    if format == "onnx":
        more["example"] = dict(traveller.inputs[0])
    try:
        found = check_drift(traveller(), format, traveller.inputs, tolerance=ANY, **more)
    except WeightsExportError as error:
        refused[f"{format}: {error}"] = None
        return "refused"
    return f"{max(found.deviations):.0e}" if max(found.deviations) else "0"


def _versions() -> dict[str, str]:
    import cyllama.llama.llama_cpp as llama_cpp
    import onnxruntime
    import peft
    import transformers

    return {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "onnxruntime": onnxruntime.__version__,
        "ggml": llama_cpp.ggml_version(),
    }


if __name__ == "__main__":
    main()
