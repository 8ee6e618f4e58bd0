"""Fake kernels lay results out as real ones do, over drawn layouts and in models that ask."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from torch import nn

from tests.budgets import outcome_of
from tests.layouts import differences, drawn


def signature(name: str, *args: Any) -> str:
    """An operation on float32 tensors, for which tuples of sizes stand."""

    def encoded(a: Any) -> Any:
        if not isinstance(a, tuple):
            return a
        strides = torch.empty(a, device="meta").stride()
        return {"t": [list(a), list(strides), "float32", "cpu"]}

    return json.dumps([f"aten.{name}", [encoded(a) for a in args], {}], separators=(",", ":"))


IMAGE, POOLED, TOKENS = (1, 4, 6, 5), (2, 8, 1, 1), (1, 6, 4)
CASES = [
    signature("relu.default", IMAGE),
    signature("gelu.default", TOKENS),
    signature("silu_backward.default", IMAGE, IMAGE),
    signature("threshold_backward.default", IMAGE, IMAGE, 0),
    signature("add.Tensor", IMAGE, (1, 4, 1, 1)),
    signature("add.Tensor", TOKENS, TOKENS),
    signature("mul.Tensor", (4, 1, 5), (1, 6, 1)),
    signature("div.Tensor", IMAGE, 2.0),
    signature("mul.Scalar", POOLED, 0.5),
    signature("pow.Tensor_Scalar", TOKENS, 3.0),
    signature("eq.Scalar", (1, 4, 1, 5), 0),
    signature("lerp.Tensor", (1, 4, 6, 1), IMAGE, IMAGE),
    signature("addcmul.default", TOKENS, TOKENS, TOKENS),
    signature("clone.default", TOKENS),
    signature("empty_like.default", IMAGE),
    signature("view.default", (1, 4, 30), [1, 4, 6, 5]),
    signature("view.default", (1, 1, 4), [1, 4]),
    signature("_log_softmax.default", (1, 7), 1, False),
    signature("native_layer_norm.default", TOKENS, [4], (4,), (4,), 1e-5),
    signature("native_group_norm.default", IMAGE, (4,), (4,), 1, 4, 30, 2, 1e-5),
    signature(
        "native_group_norm_backward.default",
        IMAGE, IMAGE, (1, 2), (1, 2), (4,), 1, 4, 30, 2, [True, True, True],
    ),
    signature(
        "native_batch_norm.default", (2, 4, 3, 5), (4,), (4,), (4,), (4,), True, 0.1, 1e-5
    ),
    signature("native_batch_norm.default", POOLED, (8,), (8,), (8,), (8,), True, 0.1, 1e-5),
    signature(
        "native_batch_norm_backward.default",
        (2, 4, 3, 5), (2, 4, 3, 5), (4,), (4,), (4,), (4,), (4,), True, 1e-5, [True, True, True],
    ),
    signature("roll.default", IMAGE, [-2, -2], [1, 2]),
    signature("_weight_norm_interface.default", (4, 2, 6), (1, 1, 6), 2),
    signature("mse_loss.default", IMAGE, IMAGE),
    signature("smooth_l1_loss.default", TOKENS, TOKENS, 2),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(json.loads(case)[0])[5:])
def test_results_lie_as_real_kernels_lay_them(case: str) -> None:
    compared = [d for d in map(differences, drawn(case)) if d is not None]
    assert len(compared) >= 3
    assert not [d for found in compared for d in found]


def unet() -> nn.Module:
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model: nn.Module = diffusers.UNet2DModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return model.train()


@pytest.mark.kind("layouts that follow steps over one element", bits=True, peak="within")
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_diffusion_unet(share: float, caplog: pytest.LogCaptureFixture) -> None:
    g = torch.Generator().manual_seed(1)
    images = torch.randn(1, 3, 32, 32, generator=g)
    batch = (images, torch.full((1,), 7))

    def step(model: nn.Module) -> torch.Tensor:
        loss: torch.Tensor = model(*batch).sample.square().mean()
        loss.backward()
        return loss

    with caplog.at_level(logging.WARNING, "actckpt"):
        found = outcome_of(
            unet, batch, step, share=share, loss_fn=lambda out: out.sample.square().mean()
        )
    assert found.exact_and_within, found
    assert not [r for r in caplog.records if r.name == "actckpt"]


def yolos() -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=[48, 48],
        patch_size=8,
        num_detection_tokens=10,
        num_labels=5,
    )
    model: nn.Module = transformers.YolosForObjectDetection(config)
    return model.train()


def boxes_loss(output: Any) -> torch.Tensor:
    loss: torch.Tensor = output.logits.square().mean() + output.pred_boxes.square().mean()
    return loss


@pytest.mark.kind("layouts after interpolation", bits=True, peak="within")
def test_a_detector_that_interpolates_its_positions(caplog: pytest.LogCaptureFixture) -> None:
    batch = {"pixel_values": torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))}

    def step(model: nn.Module) -> torch.Tensor:
        loss = boxes_loss(model(**batch))
        loss.backward()
        return loss

    with caplog.at_level(logging.WARNING, "actckpt"):
        found = outcome_of(yolos, batch, step, share=0.5, loss_fn=boxes_loss)
    assert found.exact_and_within, found
    assert not [r for r in caplog.records if r.name == "actckpt"]
