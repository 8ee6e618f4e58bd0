"""Adapters leave alone or merged, and torch's own file."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

import actckpt
from actckpt.checkpoint.files import Files
from actckpt.errors import WeightsExportError
from actckpt.exporting.folder import verify_folder
from actckpt.exporting.weights import same_bits
from tests.travelling import TRAVELLERS, gpt2, llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", "ignore:Model has .tie_word"
)
LORA = TRAVELLERS["lora"]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_peft_makes_the_same_of_base_and_adapter(tmp_path: Path) -> None:
    model: Any = LORA()
    wanted = LORA.outputs(model)
    base = {k.replace("base_model.model.", ""): v for k, v in model.state_dict().items()}
    with actckpt.Checkpointer(tmp_path / "run", model=model, every=1) as run:
        run.step({})
    done = actckpt.export(tmp_path / "run", tmp_path / "out", format="adapter", model=LORA())
    assert set(done.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert done.weights_bytes == trained
    # what is in the folder, and not the base
    manifest = verify_folder(Files(), str(done.path))
    assert set(manifest["tensors"]) == set(load_file(done.path / "adapter_model.safetensors"))
    fresh = llama()
    fresh.load_state_dict(
        {
            name: base.get(
                name,
                base.get(f"{head}.base_layer.{leaf}", base.get(f"{head}.original_module.{leaf}")),
            )
            for name in fresh.state_dict()
            for head, _, leaf in [name.rpartition(".")]
        }
    )
    assert same(LORA.outputs(PeftModel.from_pretrained(fresh, done.path)), wanted)


def test_what_no_adapter_holds_is_refused(tmp_path: Path) -> None:
    model: Any = LORA()
    model.get_base_model().model.norm.weight.requires_grad_()
    with pytest.raises(WeightsExportError, match=r"norm\.weight is trained and is no part"):
        actckpt.export(model, tmp_path / "out", format="adapter")
    with pytest.raises(WeightsExportError, match="an adapter is a part of a model of peft"):
        actckpt.export(gpt2(), tmp_path / "out", format="adapter")
    assert os.listdir(tmp_path) == []


def test_learned_prompts_are_refused_by_name(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model: Any = get_peft_model(llama(), config)
    for format, message in (
        ("adapter", "adapter default is PromptTuningConfig: of learned prompts"),
        ("huggingface", "an adapter of PromptTuningConfig cannot be merged"),
    ):
        with pytest.raises(WeightsExportError, match=message):
            actckpt.export(model, tmp_path / "out", format=format)
    # as both advise
    found = load_file(actckpt.export(model, tmp_path / "out").path / "model.safetensors")
    assert all(same_bits(found[name], x) for name, x in model.state_dict().items())


def test_an_adapter_that_peft_does_not_merge(tmp_path: Path) -> None:
    model: Any = LORA()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(torch.nan)
    with pytest.raises(WeightsExportError, match="peft cannot merge this adapter: NaNs detected"):
        actckpt.export(model, tmp_path / "out", format="huggingface")
    assert os.listdir(tmp_path) == []


def test_merging_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model: Any = LORA()
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    actckpt.export(model, tmp_path / "merged", format="huggingface")
    assert all(same_bits(model.state_dict()[k], v) for k, v in kept.items())


def test_a_merged_model_is_the_adapted_one(tmp_path: Path) -> None:
    model: Any = LORA()
    done = actckpt.export(model, tmp_path / "out", format="huggingface")
    read = type(model.get_base_model()).from_pretrained(done.path)
    assert same(LORA.outputs(read), LORA.outputs(model.merge_and_unload()))


@pytest.mark.parametrize("how", ["adapted", "copied"])
def test_merging_into_tied_weights_is_asked_for(how: str, tmp_path: Path) -> None:
    part: dict[str, Any] = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    if how == "adapted":
        part["target_modules"] = ["c_attn", "lm_head"]
    else:
        part["modules_to_save"] = ["lm_head"]
    traveller = TRAVELLERS["gpt2"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(traveller(), LoraConfig(r=2, **part))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    embedding = model.get_base_model().transformer.wte.weight.clone()
    with pytest.raises(WeightsExportError, match=r"are one tensor, .*untie=True"):
        actckpt.export(model, tmp_path / "out", format="huggingface")
    assert os.listdir(tmp_path) == []
    done = actckpt.export(model, tmp_path / "out", format="huggingface", untie=True)
    read = type(model.get_base_model()).from_pretrained(done.path)
    manifest = verify_folder(Files(), str(done.path))
    assert set(manifest["tensors"]) == set(read.state_dict())
    assert manifest["tied"] == list(done.tied) == []
    assert torch.equal(read.transformer.wte.weight, embedding)
    assert not torch.equal(read.lm_head.weight, embedding)
    for found, wanted in zip(traveller.outputs(read), traveller.outputs(model), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_torchs_own_file(tmp_path: Path) -> None:
    model: Any = TRAVELLERS["own"]()
    model.register_buffer("part", torch.arange(100_000.0)[10:12])
    done = actckpt.export(model, tmp_path / "out", format="pt")
    found = torch.load(done.path / "model.pt", weights_only=True)
    wanted = model.state_dict()
    assert list(found) == list(wanted)
    assert all(same_bits(found[k], wanted[k]) for k in wanted)
    assert found["embed.weight"].data_ptr() == found["head.weight"].data_ptr()
    # neither twice, nor with all that a part was taken from
    assert done.files["model.pt"] < done.weights_bytes + 5000
    fresh: Any = TRAVELLERS["own"]()
    fresh.register_buffer("part", torch.zeros(2))
    fresh.load_state_dict(found)
