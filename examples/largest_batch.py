"""The largest batch that fits into a budget, with recomputation and without.

    python examples/largest_batch.py

Shows: sizes are found by planning alone, no step is run; the fastest need not be the largest.
"""

import torch
from transformers import BertConfig, BertForMaskedLM

import actckpt


def main(layers: int = 2, width: int = 128, budget: str = "60MB", limit: int = 32) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
    )
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters())

    def make_batch(size: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 2000, (size, 128))
        return {"input_ids": ids, "labels": ids}

    found = {
        policy: actckpt.find_max_batch(
            model, budget, make_batch, optimizer=optimizer, policy=policy, start=4, limit=limit
        )
        for policy in ("none", "auto")
    }
    for policy, search in found.items():
        print(f"policy {policy}, budget {budget}:\n{search}\n")
    larger = found["auto"].largest / found["none"].largest
    print(f"recomputation fits a batch {larger:.1f} times as large")


if __name__ == "__main__":
    main()
