"""The layout of Hugging Face: what its own code makes of an exported folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.optim.swa_utils import AveragedModel

import actckpt
from actckpt.checkpoint.dtypes import name_of
from actckpt.checkpoint.files import Files
from actckpt.errors import ArgumentError, WeightsExportError
from actckpt.exporting.replica import replica_of
from actckpt.exporting.source import source_of
from tests.travelling import TRAVELLERS, Own, gpt2, llama


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def loaded(path: Path, model: nn.Module) -> nn.Module:
    kind: Any = type(model)
    made: nn.Module = kind.from_pretrained(path)
    return made


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit", "resnet"])
def test_from_pretrained_makes_the_same_model(name: str, tmp_path: Path) -> None:
    traveller = TRAVELLERS[name]
    model = traveller()
    wanted = traveller.outputs(model)
    # one file of several shards
    done = actckpt.export(model, tmp_path / "out", format="huggingface", max_shard_bytes=20_000)
    assert model.training
    assert same(traveller.outputs(loaded(done.path, model)), wanted)
    assert {"README.md", "config.json"} < set(done.files)
    assert ("model.safetensors.index.json" in done.files) == (done.weights_bytes > 20_000)
    assert done.notes == ()


def test_an_own_model_is_split_and_loaded_by_the_hub(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard, load_torch_model

    traveller = TRAVELLERS["own"]
    model = traveller()
    run = tmp_path / "run"
    with actckpt.Checkpointer(run, model=model, every=1, config={"lr": 1e-3}) as ckpt:
        ckpt.step({"loss": 0.25})
    done = actckpt.export(
        run, tmp_path / "out", format="huggingface", model=Own(), max_shard_bytes=1400
    )
    assert "model.safetensors.index.json" in done.files
    fresh = Own()
    assert not load_torch_model(fresh, done.path, strict=True).missing_keys
    assert same(traveller.outputs(fresh), traveller.outputs(model))
    with pytest.raises(ArgumentError, match="max_shard_bytes must be a number of bytes"):
        actckpt.export(Own(), tmp_path / "no", format="huggingface", max_shard_bytes=0)
    card = ModelCard.load(done.path / "README.md")
    assert card.data.library_name == "pytorch"
    for row in ("| step | 1 |", "| metrics: loss | 0.25 |", "| config: lr | 0.001 |"):
        assert row in card.text
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in card.text


class OnTheHub(Own, PyTorchModelHubMixin):  # type: ignore[misc] # untyped
    """Of the Hub's mixin, whose saving takes neither a state nor a size."""


def test_models_that_have_their_own_way_to_the_hub(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet: Any = UNet2DModel(block_out_channels=(8,), norm_num_groups=4, **sizes, **blocks)
    for name, model in (("unet", unet), ("mixin", OnTheHub())):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        done = actckpt.export(model, tmp_path / name, format="huggingface")
        found = loaded(done.path, model).state_dict()
        assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())


def test_a_planned_model_stays_planned(tmp_path: Path) -> None:
    traveller = TRAVELLERS["gpt2"]
    model = actckpt.optimize(traveller(), None, policy="full")
    given = traveller.inputs[0]
    model(**given, labels=given["input_ids"]).loss.backward()
    before = actckpt.report(model)
    actckpt.export(model, tmp_path / "out", format="huggingface")
    assert actckpt.report(model).plan == before.plan
    with actckpt.Checkpointer(tmp_path / "run", model=model, every=1) as run:
        run.step({})
    done = actckpt.export(tmp_path / "run", tmp_path / "two", format="huggingface", model=gpt2())
    assert "| budget: budget_bytes | None |" in (done.path / "README.md").read_text()
    model(**given, labels=given["input_ids"]).loss.backward()
    plain = actckpt.revert(model)
    assert same(traveller.outputs(loaded(tmp_path / "out", plain)), traveller.outputs(plain))


def test_mixed_precision_is_kept_and_the_cast_is_said(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model: Any = llama().to(torch.bfloat16)
    model.model.norm.float()
    done = actckpt.export(model, tmp_path / "out", format="huggingface")
    found = load_file(done.path / "model.safetensors")
    assert found["model.norm.weight"].dtype == torch.float32
    assert found["lm_head.weight"].dtype == torch.bfloat16
    (note,) = done.notes
    assert "from_pretrained casts" in note
    dtypes = {name_of(p.dtype) for p in loaded(done.path, model).parameters()}
    assert len(dtypes) == 1
    assert f"to {dtypes.pop()}, the dtype of the configuration" in note


def test_an_average_that_parts_tied_weights_is_refused(tmp_path: Path) -> None:
    model: Any = TRAVELLERS["gpt2"]()
    averaged: Any = AveragedModel(model)
    inner = averaged.module
    inner.lm_head.weight = nn.Parameter(inner.lm_head.weight.detach() + 1)
    with actckpt.Checkpointer(tmp_path / "run", model=model, ema=averaged, every=1) as run:
        run.step({})
    for format in ("huggingface", "safetensors", "pt", "dcp", "gguf", "onnx"):
        with pytest.raises(
            WeightsExportError, match=r"ties transformer\.wte\.weight and lm_head\.weight"
        ):
            actckpt.export(
                tmp_path / "run", tmp_path / "out", item="ema", model=model, format=format
            )
    assert os.listdir(tmp_path) == ["run"]


def test_an_average_in_the_models_own_class(tmp_path: Path) -> None:
    traveller = TRAVELLERS["own"]
    model: Any = traveller()
    averaged: Any = AveragedModel(model)
    with torch.no_grad():
        averaged.module.shift.add_(3)
        averaged.module.norm.weight.mul_(2)
    with actckpt.Checkpointer(tmp_path / "run", model=model, ema=averaged, every=1) as run:
        run.step({})
    source = source_of(Files(), tmp_path / "run", item="ema", model=Own())
    found = traveller.outputs(replica_of(source))
    assert same(found, traveller.outputs(averaged.module))
    assert not same(found, traveller.outputs(model))


def test_a_part_that_is_called_as_wrappers_call_theirs(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 3)})
    wanted = model.state_dict()
    averaged = AveragedModel(model)
    with actckpt.Checkpointer(tmp_path / "run", model=model, ema=averaged, every=1) as run:
        run.step({})
    how: tuple[tuple[Any, dict[str, Any]], ...] = (
        (model, {}),
        (averaged, {}),
        (tmp_path / "run", {"model": model}),
        (tmp_path / "run", {"model": model, "item": "ema"}),
    )
    for n, (source, more) in enumerate(how):
        done = actckpt.export(source, tmp_path / str(n), format="pt", **more)
        found = torch.load(done.path / "model.pt", weights_only=True)
        assert found.keys() == wanted.keys() == {"module.weight", "module.bias"}
        model.load_state_dict(found)


def test_weights_that_overlap_in_memory(tmp_path: Path) -> None:
    model: Any = gpt2()
    fused = torch.randn(100)
    for block, begin in zip(model.transformer.h, (0, 20), strict=True):
        block.ln_1.bias = nn.Parameter(fused[begin : begin + 32])
    done = actckpt.export(model, tmp_path / "out", format="huggingface")
    read: Any = loaded(done.path, model)
    assert torch.equal(read.transformer.h[1].ln_1.bias, fused[20:52])


def test_names_that_are_saved_otherwise_than_held(tmp_path: Path) -> None:
    """A Mixtral's state dict has other names than its files."""
    from safetensors import safe_open
    from transformers import MixtralConfig, MixtralForCausalLM

    size = {
        "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 40,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2,
    }  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(**size))
    done = actckpt.export(model, tmp_path / "out", format="huggingface")
    with safe_open(done.path / "model.safetensors", "pt") as file:
        assert set(file.keys()) != set(model.state_dict())
    x = torch.arange(6)[None]
    assert torch.equal(loaded(done.path, model).eval()(x).logits, model.eval()(x).logits)


def test_tokenizer_and_generation_config_go_with_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    done = actckpt.export(
        gpt2(),
        tmp_path / "out",
        format="huggingface",
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"),
        generation_config=GenerationConfig(max_new_tokens=7, bos_token_id=1, eos_token_id=2),
    )
    assert AutoTokenizer.from_pretrained(done.path)("b")["input_ids"] == [1]
    assert GenerationConfig.from_pretrained(done.path).max_new_tokens == 7


def test_what_does_not_read_back_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = gpt2()
    save = type(model).save_pretrained

    def forgetful(self: Any, path: str, state_dict: dict[str, Any], **more: Any) -> None:
        state_dict = {k: v for k, v in state_dict.items() if "ln_f.bias" not in k}
        save(self, path, state_dict=state_dict, **more)

    def wrong(self: Any, path: str, state_dict: dict[str, Any], **more: Any) -> None:
        a, b = "transformer.h.0.ln_1.weight", "transformer.h.1.ln_2.bias"
        save(self, path, state_dict={**state_dict, a: state_dict[b], b: state_dict[a]}, **more)

    for broken, message in (
        (forgetful, "does not find its own weights"),
        (wrong, "other values of"),
    ):
        monkeypatch.setattr(type(model), "save_pretrained", broken)
        with pytest.raises(WeightsExportError, match=message):
            actckpt.export(model, tmp_path / "out", format="huggingface")
        assert os.listdir(tmp_path) == []


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(WeightsExportError, match=r"pip install 'actckpt\[huggingface\]'"):
        actckpt.export(Own(), tmp_path / "out", format="huggingface")
