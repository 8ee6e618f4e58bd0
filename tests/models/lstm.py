"""An LSTM language model whose decoder weight is its embedding; returns a plain dict."""

from __future__ import annotations

import torch
from torch import nn


class LSTMLanguageModel(nn.Module):
    def __init__(self, vocab: int = 256, width: int = 64, layers: int = 4, p: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(
            [nn.LSTM(width, width, batch_first=True) for _ in range(layers)]
        )
        self.drop = nn.Dropout(p)
        self.decoder = nn.Linear(width, vocab)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.drop(self.embedding(tokens))
        for layer in self.layers:
            x = self.drop(layer(x)[0])
        logits = self.decoder(x)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return {"loss": loss, "logits": logits}
