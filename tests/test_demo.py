"""The demo's parts; ``make demo`` runs the whole of it."""

from __future__ import annotations

import torch

from actckpt.demo.figure import draw_demo
from actckpt.demo.model import GPT, GPTConfig, next_byte_loss
from actckpt.demo.text import draw_batch, standard_library_text

SMALL = GPTConfig(layers=2, width=16, heads=2, context=8)


def test_text_is_python_source_and_the_same_every_time() -> None:
    text = standard_library_text()
    assert len(text) > 1_000_000
    assert torch.equal(text, standard_library_text())
    assert b"def " in bytes(text[:100_000].tolist())


def test_batches_are_shifted_by_one_and_drawn_from_the_seed() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    ids, target = draw_batch(text, 4, 8, seed=3)
    assert ids.shape == target.shape == (4, 8)
    assert torch.equal(target, ids + 1)
    assert torch.equal(ids, draw_batch(text, 4, 8, seed=3)[0])
    assert not torch.equal(ids, draw_batch(text, 4, 8, seed=4)[0])


def test_model_is_causal_and_its_embedding_is_its_head() -> None:
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    assert model.head.weight is model.tokens.weight
    ids = torch.randint(256, (2, 8))
    changed = ids.clone()
    changed[:, 5] += 1
    before, after = model(ids), model(changed % 256)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])
    assert next_byte_loss(before, ids).shape == ()


def test_figure_says_when_losses_differ() -> None:
    def arm(name: str, loss: float, budget_bytes: int | None) -> dict[str, object]:
        return {
            "name": name,
            "losses": [5.0, loss],
            "peak_bytes": 100,
            "budget_bytes": budget_bytes,
            "time_ratio": 1.0,
        }

    for loss, title in ((4.0, "loss: equal to the last bit"), (4.5, "loss: DIFFERENT")):
        arms = [arm("no budget", 4.0, None), arm("loose", 4.0, 120), arm("tight", loss, 90)]
        assert draw_demo(arms).axes[0].get_title(loc="left") == title
