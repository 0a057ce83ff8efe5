"""Loading: every family as it is, everything else refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from microserve.protocol.errors import ConfigError, InternalError
from microserve.services.engine.model.model import load_model
from tests.support.engine.model.tiny_model import FAMILIES, make_tiny_model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny-llama")


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads(family: str, tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path / f"my-{family}", family), dtype="float32")
    spec, settings = model.spec, FAMILIES[family]
    assert spec.name == f"my-{family}"
    assert (spec.num_layers, spec.vocab_size, spec.max_model_len, spec.dtype) == (2, 320, 4096, "float32")
    assert spec.num_heads == settings["num_attention_heads"]
    assert spec.num_kv_heads == settings["num_key_value_heads"]
    assert spec.head_dim == settings.get("head_dim", 8)
    assert spec.eos_token_ids == {0, 2}
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("load_format", ["auto", "random"])
def test_weights_have_the_dtype_asked_for(llama: Path, dtype: str, load_format: str) -> None:
    model = load_model(llama, dtype=dtype, load_format=load_format)
    assert model.spec.dtype == dtype
    assert {parameter.dtype for parameter in model.module.parameters()} == {getattr(torch, dtype)}


def test_random_weights_need_only_the_config_and_are_always_the_same(llama: Path) -> None:
    for name in ("model.safetensors", "generation_config.json"):
        (llama / name).unlink()
    before = torch.random.get_rng_state()
    first = load_model(llama, dtype="float32", load_format="random")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    second = load_model(llama, dtype="float32", load_format="random")
    pairs = zip(first.module.parameters(), second.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert first.spec.eos_token_ids == {2}


def test_random_weights_are_made_on_the_device_itself(llama: Path) -> None:
    """No host could hold these on their way there."""
    edit_config(llama, vocab_size=1 << 42)
    loaded = load_model(llama, dtype="bfloat16", load_format="random", device="meta")
    assert {parameter.device.type for parameter in loaded.module.parameters()} == {"meta"}
    assert loaded.spec.vocab_size == 1 << 42


@pytest.mark.parametrize("load_format", ["auto", "random"])
def test_a_device_that_is_not_there_is_refused(llama: Path, load_format: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        load_model(llama, dtype="float32", load_format=load_format, device="cuda:99")
    assert caught.value.field == "engine.device"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2'"),
        ({"model_type": "deepseek_v3"}, "model_type 'deepseek_v3'"),
        ({"model_type": None}, "model_type None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ({"num_key_value_heads": 4}, "9 heads are no multiple of 4"),
        ({"hidden_size": "wide"}, "config.json"),
    ],
)
def test_what_is_not_served_right_is_refused_by_name(
    llama: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(llama, **changes)
    for load_format in ("auto", "random"):
        with pytest.raises(ConfigError, match=message) as caught:
            load_model(llama, dtype="float32", load_format=load_format)
        assert caught.value.field == "model.path"


def test_linear_attention_layers_are_refused(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "qwen", "qwen3")
    edit_config(directory, layer_types=["full_attention", "linear_attention"])
    with pytest.raises(ConfigError, match="linear_attention"):
        load_model(directory, dtype="float32")


def test_a_missing_weight_is_refused(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.__delitem__("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(llama, dtype="float32")


def test_an_unknown_weight_is_refused(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.update({"model.layers.0.self_attn.sinks": torch.ones(9)}))
    with pytest.raises(ConfigError, match=r"unknown: model\.layers\.0\.self_attn\.sinks"):
        load_model(llama, dtype="float32")


def test_a_weight_of_another_shape_is_refused(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ConfigError, match="cannot be served") as caught:
        load_model(llama, dtype="float32")
    assert caught.value.field == "model.path"


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_no_usable_weights_are_refused(llama: Path, content: bytes | None) -> None:
    weights = llama / "model.safetensors"
    if content is None:
        weights.unlink()
    else:
        weights.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be served"):
        load_model(llama, dtype="float32")


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_no_usable_config_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"dtype": "int8"}, "model.dtype"),
        ({"dtype": "float32", "load_format": "gguf"}, "model.load_format"),
        ({"dtype": "float32", "device": "abacus"}, "engine.device"),
    ],
)
def test_a_wrong_setting_is_named(llama: Path, settings: dict[str, str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(llama, **settings)
    assert caught.value.field == field


def test_a_call_without_a_step_is_refused(llama: Path) -> None:
    model = load_model(llama, dtype="float32")
    with pytest.raises(InternalError, match="microserve_step"):
        model.module(input_ids=torch.tensor([[1, 2]]), use_cache=False)
