"""What the command line can name, and what it says about what it cannot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from actckpt.commands.targets import load_target
from actckpt.errors import TargetError
from actckpt.versions import versions

SMALL = {
    "gpt2": {"n_layer": "2", "n_embd": "32", "n_head": "2", "vocab_size": "64"},
    "llama": {"num_hidden_layers": "1", "hidden_size": "32", "intermediate_size": "64",
              "num_attention_heads": "2", "num_key_value_heads": "1", "vocab_size": "64"},
    "bert": {"num_hidden_layers": "1", "hidden_size": "32", "num_attention_heads": "2",
             "intermediate_size": "64", "vocab_size": "64"},
    "vit": {"num_hidden_layers": "1", "hidden_size": "32", "num_attention_heads": "2",
            "intermediate_size": "64", "image_size": "32", "num_labels": "5"},
    "t5": {"num_layers": "1", "d_model": "32", "d_kv": "16", "d_ff": "64", "num_heads": "2",
           "vocab_size": "64"},
    "mixtral": {"num_hidden_layers": "1", "hidden_size": "32", "intermediate_size": "64",
                "num_attention_heads": "2", "num_key_value_heads": "1", "vocab_size": "64",
                "num_local_experts": "2", "experts_implementation": "grouped_mm"},
    "resnet": {"depths": "1,1", "hidden_sizes": "[16, 32]", "embedding_size": "8",
               "layer_type": "basic"},
    "bart": {"encoder_layers": "1", "decoder_layers": "1", "d_model": "32", "vocab_size": "64",
             "encoder_ffn_dim": "64", "decoder_ffn_dim": "64", "encoder_attention_heads": "2",
             "decoder_attention_heads": "2"},
}  # fmt: skip


def load(target: str, **more: Any) -> tuple[torch.nn.Module, Any]:
    settings: dict[str, Any] = {"overrides": {}, "batch_size": 2, "seq_len": 16, "dtype": None}
    return load_target(target, **(settings | more))


@pytest.mark.parametrize("model_type", SMALL)
def test_hugging_face_types_train(model_type: str) -> None:
    before = torch.get_rng_state()
    model, batch = load(model_type, overrides=SMALL[model_type])
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    again, same = load(model_type, overrides=SMALL[model_type])
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert all(torch.equal(batch[key], same[key]) for key in batch)


def test_overrides_reach_the_config_with_their_types() -> None:
    overrides = SMALL["gpt2"] | {
        "num_hidden_layers": "3",
        "resid_pdrop": "0",
        "embd_pdrop": "0.5",
        "use_cache": "false",
        "n_inner": "96",
        "activation_function": "relu",
    }
    del overrides["n_layer"]
    model, batch = load("gpt2", overrides=overrides, batch_size=3, seq_len=24, dtype="bf16")
    config: Any = model.config
    assert (config.n_layer, config.resid_pdrop, config.embd_pdrop) == (3, 0, 0.5)
    assert (config.use_cache, config.n_inner, config.activation_function) == (False, 96, "relu")
    assert batch["input_ids"].shape == (3, 24)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_images_have_the_dtype_of_the_weights() -> None:
    _, batch = load("vit", overrides=SMALL["vit"], dtype="bfloat16")
    assert batch["pixel_values"].dtype is torch.bfloat16
    assert batch["pixel_values"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("target", "more", "message"),
    [
        ("gpt22", {}, "did you mean gpt2"),
        (
            "gpt2",
            {"overrides": {"n_layers": "2"}},
            "has no setting 'n_layers'; did you mean n_layer",
        ),
        ("gpt2", {"overrides": {"n_layer": "two"}}, "n_layer='two': the value must be int"),
        ("gpt2", {"overrides": {"use_cache": "maybe"}}, "must be bool"),
        ("gpt2", {"overrides": {"n_layer": "1", "n_head": "7"}}, "cannot be built|refuses"),
        ("gpt2", {"seq_len": 2048}, "--set max_position_embeddings=2048"),
        ("gpt2", {"dtype": "int3"}, "unknown dtype 'int3'"),
        ("gpt2", {"batch_size": 0}, "at least 1"),
        ("clap", {}, "has none of the heads"),
        ("no_such_module:make", {}, "no module 'no_such_module'"),
        ("json:dumpz", {}, "has no function 'dumpz'; did you mean dump or dumps"),
        ("os:getcwd", {}, r"must return \(model, batch\), the model first; found str"),
        ("json:", {}, "not of the form module:function"),
        ("json:dumps", {"overrides": {"a": "1"}}, "settings apply to Hugging Face"),
        ("json:dumps", {"dtype": "bf16"}, "settings apply to Hugging Face"),
    ],
)
def test_what_does_not_exist_is_named(target: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        load(target, **more)


def test_function_of_a_module_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_target.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Linear(4, 1), torch.randn(2, 4)\n"
        "def bare():\n"
        "    return torch.nn.Linear(4, 1)\n"
    )
    (tmp_path / "broken_target.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    model, batch = load("own_target:make")
    again, same = load("own_target:make")
    assert torch.equal(model.weight, again.weight)  # type: ignore[arg-type]
    assert torch.equal(batch, same)
    with pytest.raises(TargetError, match="found Linear"):
        load("own_target:bare")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load("broken_target:make")
    assert sys.path == path


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TargetError, match="pip install transformers"):
        load("gpt2")


def test_versions_name_what_a_result_depends_on() -> None:
    found = versions()
    assert {"actckpt", "python", "torch", "platform", "cpus", "device"} <= found.keys()
    assert found["torch"] == torch.__version__
    assert all(isinstance(value, str) and value for value in found.values())
