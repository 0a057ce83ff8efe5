"""A small random model of each family that docs/models.md speaks of: what sets it apart is switched on.

``SERVED`` by the settings of its config, ``REFUSED`` by what the refusal has to say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

_SHAPE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 2.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.5,
}
_CONVOLUTIONS = ["conv", "full_attention", "conv", "full_attention"]
_DELTA_NETS = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

SERVED: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "arcee": {},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {**_WINDOWS, "logit_scale": 0.5},
    "ernie4_5": {"use_bias": True},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone4": _WINDOWS,
    "gemma": {},
    "gemma3_text": {**_WINDOWS, "query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0},
    "glm": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4_moe": {
        **_EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
    "granite": _MULTIPLIERS,
    "granitemoe": {**_LOCAL_EXPERTS, **_MULTIPLIERS},
    "helium": {},
    "hunyuan_v1_dense": {},
    "ministral3": {},
    "minimax_m2": _LOCAL_EXPERTS,
    "mixtral": {**_LOCAL_EXPERTS, "sliding_window": 8},
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "phi3": {"sliding_window": 8, "partial_rotary_factor": 0.5},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_EXPERTS, "norm_topk_prob": True},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True},
    "starcoder2": {"sliding_window": 8, "use_bias": True},
    "lfm2": {
        "layer_types": [*_CONVOLUTIONS[:2], *_CONVOLUTIONS[1::-1]],
        "block_auto_adjust_ff_dim": False,
        "conv_bias": True,
    },
    "lfm2_moe": {**_EXPERTS, "layer_types": _CONVOLUTIONS, "num_dense_layers": 1, "conv_L_cache": 4},
    "qwen3_5_text": _DELTA_NETS,
    "qwen3_next": {**_EXPERTS, **_DELTA_NETS, "shared_expert_intermediate_size": 32},
}

REFUSED: dict[str, str] = {
    "deepseek_v2": "latent",
    "deepseek_v3": "latent",
    "diffllama": "a difference of two",
    "falcon_mamba": "linear attention",
    "gemma2": "caps its attention scores",
    "gemma3": "more than text",
    "gemma3n": "more than text",
    "gemma4": "more than text",
    "gpt_oss": "attention sinks",
    "jamba": "linear attention",
    "llama4": "more than text",
    "llama4_text": "chunked",
    "mamba2": "linear attention",
    "mistral3": "more than text",
    "modernbert": "an encoder",
    "qwen2_5_vl": "more than text",
    "qwen3_vl": "more than text",
    "t5": "an encoder and a decoder",
    "whisper": "an encoder and a decoder",
    # Nobody has looked at these; what is not known is not served.
    "bloom": "nobody has tried",
    "falcon": "nobody has tried",
    "gpt2": "nobody has tried",
    "gpt_neox": "nobody has tried",
    "opt": "nobody has tried",
    "phi": "nobody has tried",
    "phimoe": "nobody has tried",
    "stablelm": "nobody has tried",
}


def make_model(directory: Path, family: str, **changed: Any) -> Path:
    """Random weights in fp32, biases and norms too, without a tokenizer; ``changed``: of its config."""
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**_SHAPE, **SERVED[family], **changed})
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
        model.save_pretrained(directory)
    return directory
