"""Which models can be served, by their config.json alone: known before a weight is read, or fetched.

Owns the list of families (docs/models.md shows it; test_families.py holds both) and why others are refused.
Imports neither torch nor transformers: whoever is about to download gigabytes asks as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from microserve.protocol.messages.kv.geometry import MAX_ROPE_CHARS

NATIVE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""By the native CPU step, where it can be had; by transformers' modules as well."""
BY_TRANSFORMERS = (
    *("arcee", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "exaone4", "gemma", "gemma3_text"),
    *("glm", "glm4", "glm4_moe", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "ministral3"),
    *("minimax_m2", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "phi3", "qwen2_moe", "qwen3_moe"),
    *("seed_oss", "starcoder2"),
)
"""By transformers' modules alone."""
HYBRID = {
    **dict.fromkeys(("lfm2", "lfm2_moe"), "conv"),
    **dict.fromkeys(("qwen3_5_text", "qwen3_next"), "linear_attention"),
}
"""By transformers' modules too: families with layers that keep a state instead of KV, and what those are
called."""
MODEL_TYPES = (*NATIVE, *BY_TRANSFORMERS, *HYBRID)

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Frequencies that depend on the length of the batch (dynamic, longrope) would make a token's K depend on its
# neighbours in the step, and on when it was computed.
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})

_LINEAR = "it has layers of linear attention or of state space that nobody has tried here"
_LATENT = "it keeps a latent instead of K and V (MLA)"
_SOFTCAP = "it caps its attention scores, which our attention does not compute"
_INPUTS = "it takes more than text"
_ENCODER = "it is an encoder and a decoder"
_WHY = {
    **dict.fromkeys(
        (
            *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "mamba"),
            *("mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "recurrent_gemma"),
            *("rwkv", "zamba", "zamba2"),
        ),
        _LINEAR,
    ),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_k2", "longcat_flash", "youtu"),
        _LATENT,
    ),
    **dict.fromkeys(("gemma2", "vaultgemma"), _SOFTCAP),
    "gpt_oss": "it has attention sinks, which our attention does not compute",
    "diffllama": "its attention is a difference of two, which ours does not compute",
    "llama4_text": "its attention is chunked, which ours does not compute",
    **dict.fromkeys(
        (
            *("gemma3", "gemma3n", "gemma4", "glm4v", "idefics3", "internvl", "llama4", "llava", "mistral3"),
            *("mllama", "paligemma", "pixtral", "qwen2_5_omni", "qwen2_5_vl", "qwen2_audio", "qwen2_vl"),
            *("qwen3_5", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "voxtral"),
        ),
        _INPUTS,
    ),
    **dict.fromkeys(("bart", "mbart", "mt5", "pegasus", "t5", "t5gemma", "umt5", "whisper"), _ENCODER),
    **dict.fromkeys(
        ("bert", "distilbert", "modernbert", "roberta", "xlm-roberta"), "it is an encoder: it writes no text"
    ),
}
"""Of families that people ask for; what else is refused is only not known."""

_UNSUPPORTED = (
    *("quantization_config", "compression_config", "attn_logit_softcapping", "attention_chunk_size"),
    "kv_lora_rank",
)
"""Settings of attention and of weights that we do not compute."""
_TOWERS = ("vision_config", "audio_config", "vision_tower", "image_token_id", "image_token_index")


def refusal_of(config: Mapping[str, Any]) -> str | None:
    """Why a model with this config.json is not served; None: it may be, as far as that file says."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        why = _WHY.get(model_type) if isinstance(model_type, str) else None
        return f"model_type {_short(model_type)} is not served: {why or _guess(config)}"
    for name in _names(config.get("architectures")):
        if not name.endswith("ForCausalLM"):
            return f"architecture {name} is not a causal language model"
    for name in _UNSUPPORTED:
        if config.get(name) is not None:
            return f"{name} {_short(config[name])} is not supported"
    if config.get("is_causal") is False or config.get("use_bidirectional_attention") is True:
        return "its attention is bidirectional: it is made for embeddings and writes no text"
    if config.get("is_encoder_decoder") is True:
        return _ENCODER
    return foreign_layers(config.get("layer_types"), HYBRID.get(model_type, "")) or foreign_rope(
        config.get("rope_parameters") or config.get("rope_scaling")
    )


def foreign_layers(layer_types: object, stateful: str = "") -> str | None:
    """What is wrong with ``layer_types``, as a config has them; ``stateful``: what a family may have
    besides."""
    foreign = set(_names(layer_types)) - LAYER_TYPES - {stateful}
    return f"layer types {sorted(foreign)} are not supported" if foreign else None


def foreign_rope(parameters: object) -> str | None:
    """What is wrong with RoPE's parameters: of all layers, or by kind of layer."""
    if not isinstance(parameters, Mapping):
        return None
    inner = [each for each in parameters.values() if isinstance(each, Mapping)]
    for each in inner or [parameters]:
        kind = each.get("rope_type", each.get("type", "default"))
        if kind not in ROPE_TYPES:
            return f"rope_type {kind!r} is not one of {sorted(ROPE_TYPES)}"
    return None


def rope_of(config: Mapping[str, Any]) -> str:
    """RoPE of a config.json in words, the same in its older form: ``default theta=10000``. Of what is
    too long its digest; where kinds of layers have parameters of their own, all of them."""
    given = config.get("rope_parameters") or config.get("rope_scaling")
    parameters: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if config.get(name) is not None:
            parameters.setdefault(name, config[name])
    older = parameters.pop("type", None)
    kind = parameters.pop("rope_type", older or "default")
    words = [f"{name.removeprefix('rope_')}={_in_words(parameters[name])}" for name in sorted(parameters)]
    text = " ".join([kind, *words])
    if len(text) <= MAX_ROPE_CHARS:
        return text
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _in_words(value: object) -> str:
    """10000 and 10000.0 are one number."""
    if isinstance(value, Mapping):
        return "{" + " ".join(f"{name}={_in_words(value[name])}" for name in sorted(value)) + "}"
    return f"{value:.17g}" if isinstance(value, int | float) else str(value)


def _guess(config: Mapping[str, Any]) -> str:
    if config.get("is_encoder_decoder") is True:
        return _ENCODER
    if any(config.get(name) is not None for name in _TOWERS):
        return _INPUTS
    if config.get("kv_lora_rank") is not None:
        return _LATENT
    if "linear_attention" in _names(config.get("layer_types")):
        return _LINEAR
    return f"nobody has tried it here; those that are: {', '.join(MODEL_TYPES)}"


def _names(value: object) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _short(value: object) -> str:
    if isinstance(value, Mapping) and "quant_method" in value:
        return f"({value['quant_method']})"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
