"""Every family of docs/models.md gives the tokens of transformers, or is refused by its config.json alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from microserve.gateway.parsing.families import THOUGHTS, TOOLS
from microserve.protocol.errors import ConfigError, InternalError
from microserve.services.engine.model.attention.step import DeviceAttention, device_attention
from microserve.services.engine.model.directory.families import (
    BY_TRANSFORMERS,
    HYBRID,
    MODEL_TYPES,
    NATIVE,
    refusal_of,
    rope_of,
)
from microserve.services.engine.model.model import ATTENTION, STEP, load_model
from microserve.services.engine.native.packing import missing
from tests.support.engine.model.families import REFUSED, SERVED, make_model
from tests.support.engine.model.random_batches import World, random_prompt, serve

VARIATIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 5e5,
            }
        },
    ),
    (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e6,
            },
            "tie_word_embeddings": True,
        },
    ),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [1], "tie_word_embeddings": True}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    ("phi3", {"partial_rotary_factor": 1.0, "sliding_window": None}),
    ("cohere", {"use_qk_norm": False}),
    ("glm4_moe", {"use_qk_norm": False, "attention_bias": True, "norm_topk_prob": False}),
    ("granite", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    ("lfm2", {"layer_types": None, "full_attn_idxs": [1, 3], "conv_bias": False, "conv_L_cache": 3}),
    ("qwen3_next", {"layer_types": None, "full_attention_interval": 2, "linear_num_value_heads": 2}),
    ("qwen3_5_text", {"layer_types": ["full_attention"] * 4}),
]
"""Of families, what published models of them differ in."""
DOCUMENT = Path(__file__).parents[5] / "docs" / "models.md"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("family", "changed"), [*((family, {}) for family in MODEL_TYPES), *VARIATIONS])
def test_a_family_that_is_served_gives_the_tokens_of_transformers(
    family: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    """By our attention for a CPU and by that for a device; the native step has tests of its own."""
    directory = make_model(tmp_path / family, family, **changed)
    oracle: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = load_model(directory, dtype="float32")
    rng = random.Random(1)
    prompts = [random_prompt(rng, length) for length in (1, 14, 37)]
    worlds = [World(model, oracle), World(model, oracle, device_attention)]
    expected = [worlds[0].expected(prompt, 5) for prompt in prompts]
    for world in worlds:
        assert serve(world, prompts, 5, rng) == expected
    assert (missing(model) is None) == (family in NATIVE and "mlp_bias" not in changed)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_the_size_of_a_family_is_known_before_its_weights_are_read(family: str, tmp_path: Path) -> None:
    """What is asked of memory is asked of a sketch, and it is what is loaded."""
    directory = make_model(tmp_path / family, family)
    sketch, loaded = (
        load_model(directory, dtype="bfloat16", device=device, load_format=load_format)
        for device, load_format in (("meta", "random"), ("cpu", "auto"))
    )
    sizes = [sum(each.numel() for each in model.module.parameters()) for model in (sketch, loaded)]
    assert sizes[0] == sizes[1] > 0
    assert replace(sketch.spec, revision="") == replace(loaded.spec, revision="")


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_the_windows_of_a_family_are_those_that_its_layers_ask_for(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kernels are planned with is read from the config; what is computed comes from the layers."""
    model = load_model(make_model(tmp_path / family, family), dtype="float32")
    asked: set[int | None] = set()
    attend = DeviceAttention.attend

    def listen(
        self: DeviceAttention, query: Tensor, kv: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        asked.add(sliding_window)
        return attend(self, query, kv, scale=scale, sliding_window=sliding_window)

    monkeypatch.setattr(DeviceAttention, "attend", listen)
    world = World(model, None, device_attention)
    serve(world, [[5, 6, 7]], 1, random.Random(1))
    assert asked == set(model.spec.sliding_windows)


def test_every_family_that_is_let_in_is_tried() -> None:
    assert set(SERVED) == set(MODEL_TYPES) == {*NATIVE, *BY_TRANSFORMERS, *HYBRID}
    assert not set(SERVED) & set(REFUSED)


@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_a_family_that_is_not_served_is_refused_with_the_reason(
    family: str, reason: str, tmp_path: Path
) -> None:
    """By what transformers itself writes as its config.json: nothing of it is made up."""
    config = AutoConfig.for_model(family).to_dict()
    assert family in (refusal := refusal_of(config) or "") and reason in refusal
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ConfigError, match="cannot be served"):
        load_model(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "brand_new"}, "nobody has tried it"),
        ({"model_type": "brand_new", "vision_config": {}}, "more than text"),
        ({"model_type": "brand_new", "kv_lora_rank": 512}, "latent"),
        ({"model_type": "brand_new", "layer_types": ["linear_attention"]}, "linear attention"),
        ({"model_type": "brand_new", "is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"model_type": ["llama"]}, "nobody has tried it"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel is not a causal language model"),
        ({"quantization_config": {"quant_method": "fp8", "a": "b" * 99}}, r"quantization_config \(fp8\)"),
        ({"is_causal": False}, "bidirectional"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"layer_types": ["full_attention", "conv"]}, r"layer types \['conv'\]"),
        (
            {"model_type": "lfm2", "architectures": None, "layer_types": ["linear_attention"]},
            r"layer types \['linear_attention'\]",
        ),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope'"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "rope_type 'longrope'"),
    ],
)
def test_a_config_is_refused_before_anything_is_loaded(changes: dict[str, Any], reason: str) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **changes}
    assert re.search(reason, refusal_of(config) or "")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "rope_scaling": None, "quantization_config": None},
        {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_type": "linear"}}},
    ],
)
def test_a_config_that_says_nothing_against_it_is_let_in(config: dict[str, Any]) -> None:
    assert refusal_of(config) is None


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_attention_that_is_asked_for_more_than_it_computes_says_so(name: str) -> None:
    """A new release of transformers may give a family something new: never other tokens without a word."""
    from transformers import AttentionInterface

    empty = torch.zeros(1, 1, 1, 1)
    with pytest.raises(InternalError, match=name):
        AttentionInterface()[ATTENTION](
            torch.nn.Module(), empty, empty, empty, None, scaling=1.0, **{STEP: object(), name: empty}
        )


def test_the_document_names_parsers_that_there_are() -> None:
    rows = [line.split("|") for line in DOCUMENT.read_text().splitlines() if line.startswith("| tools of")]
    assert len(rows) > 4
    for row in rows:
        assert set(re.findall(r"`(\w+)`", row[2])) <= set(TOOLS)
        assert set(re.findall(r"`(\w+)`", row[3])) <= set(THOUGHTS)


def test_the_document_names_every_family() -> None:
    rows = {
        model_type: line
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith("| `")
        for model_type in re.findall(r"`([a-z0-9_]+)`", line.split("|")[1])
    }
    step = {model_type: rows.get(model_type, "||").split("|")[2].strip() for model_type in MODEL_TYPES}
    assert step == {each: "native" if each in NATIVE else "transformers" for each in MODEL_TYPES}
    assert {each for each in REFUSED if "refused" not in rows.get(each, "")} == set()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "default"),
        ({"rope_theta": 10000}, "default theta=10000"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, "default theta=10000"),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "linear factor=2 theta=500000",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 500000}},
            "linear factor=2 theta=500000",
        ),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "default partial_rotary_factor=0.5 theta=10000"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6},
                    "sliding_attention": {"rope_theta": 1e4},
                }
            },
            "default full_attention={rope_theta=1000000} sliding_attention={rope_theta=10000}",
        ),
    ],
)
def test_rope_in_words_is_the_same_for_both_forms_of_a_config(config: dict[str, Any], words: str) -> None:
    assert rope_of(config) == words


def test_rope_of_many_parameters_is_their_digest() -> None:
    long = {"rope_parameters": {"rope_type": "yarn", "long_factor": [1.5] * 64}}
    other = {"rope_parameters": {"rope_type": "yarn", "long_factor": [1.5] * 63}}

    assert rope_of(long).startswith("sha256:")
    assert rope_of(long) != rope_of(other)
