"""One training until its second optimizer step: what `experiments.planning_time` runs in each tree.

It imports the package that comes first on the path, and prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch

STEPS = 2
ACCUMULATE = 2
SEED = 0
# of the untouched peaks of 39.1 and 346 MB
BUDGETS_GB = {"lora": 0.025, "demo": 0.18}


# processor seconds until the last step has ended, predicted overhead of the plan then in force
Found = tuple[float, float | None]


class Clock:
    """Processor seconds of the process, from the beginning of a training."""

    def __init__(self) -> None:
        self.began_s = time.process_time()

    def read_s(self) -> float:
        return time.process_time() - self.began_s


def lora(arm: str) -> Found:
    """A four-layer Llama with adapters under Trainer, two micro-batches a step."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    import actckpt

    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=900, pad_token_id=0,
    )  # fmt: skip
    adapters = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1
    )
    model: Any = get_peft_model(LlamaForCausalLM(config), adapters)
    ids = torch.randint(5, 900, (64, 200))
    data = [{"input_ids": i, "labels": i.clone(), "attention_mask": i > 0} for i in ids]
    taken_s: list[float] = []
    overhead: list[float] = []

    class Optimizes(TrainerCallback):  # type: ignore[misc]
        """What a user of any build would write."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.clock = Clock()
            if arm == "optimize":
                actckpt.optimize(model, BUDGETS_GB["lora"])

        def on_step_end(self, *_: Any, **__: Any) -> None:
            taken_s.append(self.clock.read_s())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if arm != "untouched":
                overhead.append(actckpt.report(model).overhead)

    callbacks: list[Any] = [Optimizes()]
    if arm == "MemoryBudget":
        from actckpt.integrations.transformers import MemoryBudget

        callbacks.append(MemoryBudget(BUDGETS_GB["lora"]))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=4, max_steps=STEPS, report_to=[], seed=SEED,
            save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=100,
            gradient_accumulation_steps=ACCUMULATE,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    return taken_s[STEPS - 1], next(iter(overhead), None)


def demo(arm: str) -> Found:
    """The demo's model in a plain loop.

    Args:
        arm: "untouched"; "optimize", which plans in the first forward; "given", which is told
            batch, loss and optimizer; "… accumulate" has two micro-batches a step.
    """
    import actckpt
    from actckpt.demo.model import GPT, GPTConfig, next_byte_loss

    torch.manual_seed(SEED)
    config = GPTConfig()
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 256, (2 * STEPS, 16, config.context))
    clock = Clock()
    budget_gb = BUDGETS_GB["demo"]
    if arm == "given":
        actckpt.optimize(
            model, budget_gb, batch=ids[0], loss_fn=next_byte_loss, target=ids[0],
            optimizer=optimizer,
        )  # fmt: skip
    elif not arm.startswith("untouched"):
        actckpt.optimize(model, budget_gb)
    micro = ACCUMULATE if "accumulate" in arm else 1
    for n in range(STEPS * micro):
        next_byte_loss(model(ids[n]), ids[n]).backward()
        if (n + 1) % micro == 0:
            optimizer.step()
            optimizer.zero_grad()
    taken_s = clock.read_s()
    untouched = arm.startswith("untouched")
    return taken_s, None if untouched else actckpt.report(model).overhead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("training", choices=("lora", "demo"))
    parser.add_argument("arm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    taken_s, overhead = (lora if options.training == "lora" else demo)(options.arm)
    print(json.dumps({"cpu_s": taken_s, "overhead": overhead}))


if __name__ == "__main__":
    main()
