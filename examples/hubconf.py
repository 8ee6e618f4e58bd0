"""PyTorch Hub: a template that serves a folder which ``actckpt.export`` has made.

    python examples/hubconf.py

Shows: a model exported, and loaded by ``torch.hub`` with the same bits.

Copy it to the root of a repository, beside the exported folder ``weights``, and make `build` your
own model; then ``torch.hub.load("owner/name", "model")`` has it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

dependencies = ["torch", "safetensors"]
WEIGHTS = Path(__file__).parent / "weights"


def build() -> nn.Module:
    """The architecture; its weights are replaced."""
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def model(pretrained: bool = True) -> nn.Module:
    """The model in evaluation mode.

    Args:
        pretrained: with the exported weights.
    """
    made = build()
    if pretrained:
        made.load_state_dict(load_file(WEIGHTS / "model.safetensors"))
    return made.eval()


def main(folder: str = "hub") -> None:
    """Exports a model, and loads it as a user of the hub would."""
    import shutil

    import actckpt

    place = Path(folder)
    place.mkdir(exist_ok=True)
    shutil.copy(__file__, place / "hubconf.py")
    trained = build()
    actckpt.export(trained, place / "weights", format="safetensors")
    loaded = torch.hub.load(str(place), "model", source="local")
    x = torch.randn(3, 4)
    print(f"outputs equal to the last bit: {torch.equal(loaded(x), trained(x))}")


if __name__ == "__main__":
    main()
