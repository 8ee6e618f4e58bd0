"""Small models and data that are trained under trainers: texts and rows, LoRA around both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

VOCABULARY, PADDING, END = 64, 60, 61


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Each of a seed of its own.

    Args:
        size: how many there are.
        words: of one.
    """

    def __init__(self, size: int = 14, words: int = 24) -> None:
        self._size = size
        self._words = words

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(0, PADDING, (self._words,), generator=generator)
        return {"input_ids": words, "labels": words}


class Rows(Dataset[Any]):
    """Each of a seed of its own.

    Args:
        size: how many samples there are.
        rows: of one sample.
    """

    def __init__(self, size: int = 22, rows: int = 1) -> None:
        self._size = size
        self._rows = rows

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(self._rows, 8, generator=torch.Generator().manual_seed(index))


def make_llama(layers: int = 2, width: int = 32, **settings: Any) -> Any:
    """A Llama with the same weights every time."""
    import transformers

    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        pad_token_id=PADDING,
        eos_token_id=END,
        **settings,
    )
    return transformers.LlamaForCausalLM(config)


def with_adapters(model: nn.Module, targets: Any, **settings: Any) -> Any:
    """The model, of which adapters are trained that draw dropout masks.

    Args:
        targets: names of modules, or a pattern of them.
    """
    import peft

    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=targets, **settings)
    return peft.get_peft_model(model, config)


def make_lora(layers: int = 2, width: int = 32, **settings: Any) -> Any:
    """A Llama that draws dropout masks, of which adapters are trained."""
    model = make_llama(layers, width, attention_dropout=0.1, **settings)
    return with_adapters(model, ["q_proj", "v_proj"], task_type="CAUSAL_LM")


class Blocks(nn.Module):
    """Residual blocks over rows, and what adapters are put into by `ADAPTED`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(8, 128) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(128, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(x)))
        return x


ADAPTED = r"(.*\.)?(up|down)\.\d"


def next_row_loss(predicted: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """How far each row is from the one before it in the batch."""
    return (predicted - rows.roll(1, -1)).square().mean()


def make_tokenizer() -> Any:
    """Of the words w0 to w59."""
    import tokenizers
    import transformers

    vocabulary = {f"w{i}": i for i in range(PADDING)} | {"<pad>": 60, "<eos>": 61, "<unk>": 62}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def text(number: int, words: int) -> str:
    """A text of so many words, another for each number."""
    return " ".join(f"w{(number * 7 + j * j) % PADDING}" for j in range(words))
