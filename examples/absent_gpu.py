"""A plan for a GPU that is not here, without weights and without running anything.

    python examples/absent_gpu.py

Shows: whether a model trains on a GPU, and how much slower, before anybody pays for one. The
operations are those that PyTorch would choose there, their times come from its data sheet. The
budget is a share of the memory that the GPU has.
"""

import subprocess
import sys


def main(
    layers: int = 4,
    width: int = 2048,
    length: int = 2048,
    device: str = "rtx-4090",
    budget: str = "50%",
) -> None:
    command = [
        sys.executable, "-m", "actckpt", "plan", "llama",
        "--set", f"num_hidden_layers={layers}",
        "--set", f"hidden_size={width}",
        "--set", f"intermediate_size={width * 11 // 4}",
        "--set", "num_attention_heads=16", "--set", "num_key_value_heads=16",
        "--batch-size", "8", "--seq-len", str(length), "--dtype", "bf16",
        "--device", device, "--budget-gb", budget,
    ]  # fmt: skip
    # as a person would at a terminal
    print(" ".join(["actckpt", *command[3:]]))
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
