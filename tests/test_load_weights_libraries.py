"""`load_weights` on what other libraries write: transformers, the Hub, PEFT, Lightning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from actckpt import CheckpointError, CheckpointMismatchError, load_weights

with warnings.catch_warnings():  # of the libraries about each other
    warnings.simplefilter("ignore")
    import huggingface_hub
    import lightning
    import peft
    import transformers


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is in it now."""
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_holds(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in found if not same(found[name], wanted[name])] == []


def config(kind: str, **options: Any) -> Any:
    """Of a tiny model."""
    sizes = {
        "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 8},
        "llama": {
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1,
        },
        "bert": {
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 8,
        },
        "mixtral": {
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2,
        },
    }  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.AutoConfig.for_model(
        kind, vocab_size=19, **sizes[kind], **special, **options
    )


def language_model(kind: str, seed: int = 0, **options: Any) -> Any:
    """With values of its own."""
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config(kind, **options))


# transformers


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_folders_of_transformers(kind: str, tmp_path: Path) -> None:
    source = language_model(kind, 1)
    source.save_pretrained(tmp_path / "whole")
    source.save_pretrained(tmp_path / "shards", max_shard_size="2kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("whole", "shards"):
        model = language_model(kind)
        load_weights(model, tmp_path / folder)
        assert_holds(model, copied(source))
    tied = kind == "gpt2"
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied


def test_a_folder_in_bfloat16_is_cast_to_the_models_own_dtype_and_said(tmp_path: Path) -> None:
    source = language_model("llama", 1).bfloat16()
    source.save_pretrained(tmp_path)
    model = language_model("llama")
    report = load_weights(model, tmp_path)
    assert len(report.cast) == len(copied(model))
    assert all(same(x, y.float()) for x, y in zip(
        model.state_dict().values(), source.state_dict().values(), strict=True))  # fmt: skip


def test_a_base_model_and_another_head_begin_from_a_language_model(tmp_path: Path) -> None:
    source = language_model("gpt2", 1)
    source.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_config(config("gpt2"))
    with pytest.raises(CheckpointMismatchError) as raised:
        load_weights(base, tmp_path)
    assert 'names={"transformer.": ""}' in str(raised.value)
    load_weights(base, tmp_path, names={"transformer.": ""})
    assert_holds(base, copied(source.transformer))
    classes = transformers.AutoModelForSequenceClassification.from_config(config("gpt2"))
    head = classes.score.weight.detach().clone()
    report = load_weights(classes, tmp_path, strict="shapes")
    assert report.missing == ("score.weight",)
    assert same(classes.score.weight, head)
    assert_holds(classes.transformer, copied(source.transformer))


def test_what_a_model_says_itself_that_it_ignores(tmp_path: Path) -> None:
    """Names that older files hold."""
    source, model = language_model("gpt2", 1), language_model("gpt2")
    state = {**copied(source.transformer), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(state, tmp_path / "model.safetensors")
    names = {"": "transformer."}
    with pytest.raises(CheckpointMismatchError, match=r"nothing for 1: .*masked_bias"):
        load_weights(model, tmp_path, names=names)
    model._keys_to_ignore_on_load_unexpected = [r"attn\.masked_bias"]
    report = load_weights(model, tmp_path, names=names)
    assert report.left_out == ("transformer.h.0.attn.masked_bias",)
    assert_holds(model, copied(source))


def test_a_mixtral_is_stored_under_other_names(tmp_path: Path) -> None:
    """Experts one by one in the file, together in the model: transformers converts them."""
    source = language_model("mixtral", 1)
    source.save_pretrained(tmp_path)
    model = language_model("mixtral")
    before = copied(model)
    with pytest.raises(CheckpointMismatchError) as raised:
        load_weights(model, tmp_path)
    assert "MixtralForCausalLM.from_pretrained(folder)" in str(raised.value)
    assert_holds(model, before)
    load_weights(model, type(model).from_pretrained(tmp_path).state_dict())
    assert_holds(model, copied(source))


def test_whole_and_then_sharded_in_one_folder_is_refused(tmp_path: Path) -> None:
    """There `from_pretrained` reads the old file."""
    old, new = language_model("gpt2", 1), language_model("gpt2", 2)
    old.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path, max_shard_size="2kB")
    model = language_model("gpt2")
    before = copied(model)
    if (tmp_path / "model.safetensors").exists():
        with pytest.raises(CheckpointError, match="which are newer"):
            load_weights(model, tmp_path)
        assert_holds(model, before)
    load_weights(model, tmp_path / "model.safetensors.index.json")
    assert_holds(model, copied(new))


def test_what_the_hub_saves_of_a_tied_model_is_loaded_whole(tmp_path: Path) -> None:
    """It drops the name under which `from_pretrained` looks for the embedding."""
    source = language_model("gpt2", 1)
    huggingface_hub.save_torch_model(source, tmp_path)
    model = language_model("gpt2")
    load_weights(model, tmp_path)
    assert_holds(model, copied(source))


def test_a_model_that_is_tied_and_one_that_is_not(tmp_path: Path) -> None:
    tied, untied = language_model("llama", 1, tie_word_embeddings=True), language_model("llama", 2)
    tied.save_pretrained(tmp_path / "tied")
    untied.save_pretrained(tmp_path / "untied")
    with pytest.raises(CheckpointMismatchError, match=r"lacks 1 of the model.s: lm_head\.weight"):
        load_weights(language_model("llama"), tmp_path / "tied")
    with pytest.raises(CheckpointMismatchError, match="one tensor in this model"):
        load_weights(language_model("llama", tie_word_embeddings=True), tmp_path / "untied")


# PEFT


def adapted(seed: int = 0, **options: Any) -> Any:
    """A GPT-2 with adapters, and a part that is trained whole."""
    options = {"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["ln_f"], **options}
    model = peft.get_peft_model(
        language_model("gpt2"), peft.LoraConfig(fan_in_fan_out=True, **options)
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.uniform_()
    return model


def test_an_adapter_goes_into_the_adapter_of_a_model(tmp_path: Path) -> None:
    source, model = adapted(1), adapted(2)
    source.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    load_weights(adapted(2), tmp_path / "adapter_model.safetensors")
    report = load_weights(model, tmp_path)
    assert len(report.loaded) == len(stored)
    assert report.missing == report.unexpected == ()
    assert_holds(model, copied(source))


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    adapted(1).save_pretrained(tmp_path)
    models = {
        "peft.get_peft_model": language_model("gpt2"),
        "lora_alpha was 8, is 32": adapted(lora_alpha=32),
        "use_rslora was False, is True": adapted(use_rslora=True),
        "r was 2, is 4": adapted(r=4),
        "c_fc": adapted(target_modules=["c_attn", "c_fc"]),
    }
    for told, model in models.items():
        before = copied(model)
        with pytest.raises(CheckpointMismatchError) as raised:
            load_weights(model, tmp_path)
        assert told in str(raised.value)
        assert_holds(model, before)


def test_what_a_configuration_does_not_say_is_the_default_of_peft(tmp_path: Path) -> None:
    adapted(1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in said.items() if k not in ("lora_alpha", "bias")}))
    model = adapted(2, lora_alpha=32)
    before = copied(model)
    with pytest.raises(CheckpointMismatchError, match=r"lora_alpha was 8 \(peft's default\), is"):
        load_weights(model, tmp_path)
    assert_holds(model, before)
    load_weights(adapted(2), tmp_path)


def test_nothing_is_loaded_under_merged_adapters(tmp_path: Path) -> None:
    """`unmerge_adapter` would take away what was never added."""
    source, model = adapted(1), adapted(2)
    source.save_pretrained(tmp_path)
    model.merge_adapter()
    before = copied(model)
    for what in (tmp_path, source.state_dict()):
        with pytest.raises(CheckpointMismatchError, match=r"unmerge_adapter\(\) first"):
            load_weights(model, what)
        assert_holds(model, before)
    model.unmerge_adapter()
    load_weights(model, tmp_path)


def test_adapter_keys_for_layers_that_the_base_lacks(tmp_path: Path) -> None:
    """With which peft itself loads what fits, and says nothing."""
    adapted(1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    more = {k.replace(".h.1.", ".h.7."): v.clone() for k, v in state.items() if ".h.1." in k}
    save_file({**state, **more}, path)
    model = adapted(2)
    before = copied(model)
    with pytest.raises(CheckpointMismatchError) as raised:
        load_weights(model, tmp_path)
    assert ".h.7." in str(raised.value)
    assert_holds(model, before)
    assert load_weights(model, tmp_path, strict="shapes").unexpected == tuple(more)


# Lightning


def test_checkpoints_of_lightning(tmp_path: Path) -> None:
    from tests.fitted import Lit

    source = Lit()
    with torch.no_grad():
        next(source.net.parameters()).add_(1)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.strategy.connect(source)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = Lit()
    report = load_weights(model, tmp_path / "last.ckpt")
    assert report.kind == "a checkpoint of Lightning"
    assert_holds(model, copied(source))
    inner = Lit().net
    with pytest.raises(CheckpointMismatchError) as raised:
        load_weights(inner, tmp_path / "last.ckpt")
    assert 'names={"net.": ""}' in str(raised.value)
    load_weights(inner, tmp_path / "last.ckpt", names={"net.": ""})
    assert_holds(inner, copied(source.net))
