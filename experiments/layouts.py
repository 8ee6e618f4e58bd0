"""Do fake kernels lay results out as real ones do, over drawn layouts? Every operation of the zoo.

One step of each model is taken for the operations that it calls; each of these runs on its
arguments laid out in drawn ways (contiguous, channels last, transposed, expanded, sliced, and other
steps over dimensions of 1), for real and on fakes, as a trace has them.

    python -m experiments.layouts [MODEL ...] [--most N]
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import actckpt
from experiments.arguments import add_models
from experiments.progress import progress
from experiments.results import circumstances, markdown_table, write_json_lines, write_markdown
from tests.layouts import Collector, sweep
from tests.suite import CASES, step

MOST = 4

Row = dict[str, Any]


def diffusion_unet() -> Callable[[], Any]:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    images = torch.randn(1, 3, 32, 32)
    return lambda: model(images, torch.zeros(1, dtype=torch.long)).sample.square().mean()


def hugging_face(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**settings)
        model: nn.Module = getattr(transformers, f"{name}Model")(config)
        return model.train()

    return make


def on_images(make: Callable[[], nn.Module], batch: int, size: int) -> Callable[[], Any]:
    model = make()
    images = torch.randn(batch, 3, size, size)
    return lambda: model(pixel_values=images).last_hidden_state.square().mean()


def on_sound(make: Callable[[], nn.Module]) -> Callable[[], Any]:
    model = make()
    sound = torch.randn(1, 4000)
    return lambda: model(sound).last_hidden_state.square().mean()


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MORE: dict[str, Callable[[], Callable[[], Any]]] = {
    "diffusers_unet": diffusion_unet,
    "yolos": lambda: on_images(
        hugging_face("Yolos", **SMALL, intermediate_size=64, image_size=[48, 48], patch_size=8),
        2,
        64,
    ),
    "convnext": lambda: on_images(
        hugging_face("ConvNext", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2), 1, 32
    ),
    "swin": lambda: on_images(
        hugging_face(
            "Swin", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
            window_size=4,
        ),
        1,
        32,
    ),
    "segformer": lambda: on_images(
        hugging_face(
            "Segformer", hidden_sizes=[16, 32], depths=[1, 1], num_encoder_blocks=2,
            sr_ratios=[4, 2], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
        ),
        1,
        64,
    ),
    "wav2vec2": lambda: on_sound(
        hugging_face("Wav2Vec2", **SMALL, intermediate_size=64, num_conv_pos_embeddings=16)
    ),
}  # fmt: skip
SUITE = ("gpt2", "llama", "bert", "vit", "resnet", "t5", "mixtral", "unet", "densenet", "lstm",
         "autocast")  # fmt: skip


def signatures_of(name: str) -> list[str]:
    """The operations that a step of a model calls."""
    torch.manual_seed(0)
    collector = Collector()
    if name in MORE:
        forward = MORE[name]()
        with collector:
            forward().backward()
    else:
        case = CASES[name]
        model, batch = case.build(), case.batch()
        with collector:
            step(case, model, batch)
    return list(collector.signatures)


def chosen(signatures: dict[str, None], most: int) -> list[str]:
    """At most so many of each operation, small ones where there are."""
    by_op: dict[str, list[str]] = {}
    for signature in signatures:
        by_op.setdefault(json.loads(signature)[0], []).append(signature)
    draw = random.Random(0)
    return [s for own in by_op.values() for s in draw.sample(own, min(len(own), most))]


def rows_of(signatures: list[str]) -> list[Row]:
    """A row for each operation, with an example of each kind of difference."""
    rows = []
    count = len({json.loads(s)[0] for s in signatures})
    with progress(count, "operations") as done:
        for op, draws, found in sweep(signatures):
            kinds = Counter(d.kind for d in found)
            examples = {d.kind: d for d in reversed(found)}
            rows.append(
                {
                    "operation": op,
                    "draws": draws,
                    "differences": dict(kinds),
                    "examples": [
                        {"kind": k, "signature": d.signature, "result": d.output,
                         "fake": d.fake, "real": d.real}
                        for k, d in sorted(examples.items())
                    ],
                }
            )  # fmt: skip
            done(f"{op}: {draws} draws, {sum(kinds.values())} differ")
    return rows


def write(about: dict[str, Any], rows: list[Row]) -> None:
    write_json_lines("layouts", about, rows)
    differing = [r for r in rows if r["differences"]]
    table = [
        [
            r["operation"].removeprefix("aten."),
            str(r["draws"]),
            ", ".join(f"{n} {kind}" for kind, n in r["differences"].items()),
            f"{e['fake'][:60]} for {e['real'][:60]}",
        ]
        for r in differing
        for e in r["examples"][:1]
    ]
    unrun = [r["operation"].removeprefix("aten.") for r in rows if not r["draws"]]
    draws = sum(r["draws"] for r in rows)
    write_markdown(
        "layouts",
        about,
        "# Layouts of fake and real results",
        f"{len(rows)} operations, {draws} draws: {draws - _differ(rows)} laid out alike, "
        f"{_differ(rows)} not, of {len(differing)} operations.",
        markdown_table(["operation", "draws", "differences", "fake for real"], table)
        if table
        else "No difference is left.",
        f"Not run on made-up arguments: {', '.join(unrun) or 'none'}.",
    )


def _differ(rows: list[Row]) -> int:
    return sum(sum(r["differences"].values()) for r in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = (*SUITE, *MORE)
    add_models(parser, names)
    parser.add_argument("--most", type=int, default=MOST, help="arguments of each operation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signatures: dict[str, None] = {}
    models = options.models or names
    for name in models:
        found = signatures_of(name)
        signatures.update(dict.fromkeys(found))
        print(f"{name}: {len(found)} operations on other arguments", flush=True)
    rows = rows_of(chosen(signatures, options.most))
    versions = {"torch": str(torch.__version__), "actckpt": actckpt.__version__}
    write(circumstances(versions, models=", ".join(models)), rows)


if __name__ == "__main__":
    main()
