"""Hugging Face's Trainer with LoRA adapters, within a budget and resumed where it was.

    python examples/trainer_lora.py

Shows: one callback; nothing else of the script knows of the budget.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from actckpt.integrations.transformers import MemoryBudget


class Sequences(Dataset):  # type: ignore[type-arg]
    """Random tokens in place of a tokenized corpus."""

    def __init__(self, count: int, length: int) -> None:
        self.ids = torch.randint(1000, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def main(layers: int = 4, width: int = 128, steps: int = 6, budget: str = "45MB") -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.05)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    with tempfile.TemporaryDirectory() as folder:
        memory = MemoryBudget(budget, checkpoints=f"{folder}/checkpoints", every=2)
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=8,
                save_strategy="no",
                report_to=[],
                logging_steps=2,
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Sequences(64, 128),
            callbacks=[memory],
        )
        trainer.train()
        report = memory.report
        print(report)
        peaks = [arm.peak_bytes / 1e6 for arm in (report.planned, report.baseline)]
        print(f"peak {peaks[0]:.1f} MB of {peaks[1]:.1f}, budget {budget}")
        print(f"resumed: {memory.resumed}")


if __name__ == "__main__":
    main()
