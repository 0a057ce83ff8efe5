"""Make a tiny random LoRA adapter, in the files that PEFT writes, for a model of ``tiny_model.py``.

Its numbers are large enough that greedy text goes another way than the base model's.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_tiny_adapter(path: str | Path, model: str | Path, *, seed: int = 0, rank: int = 4) -> Path:
    """Write to ``path`` and return it: an adapter of all attention projections of the model in ``model``.
    The same arguments give the same bytes."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((Path(model) / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // heads
    query, kv = heads * head_size, config["num_key_value_heads"] * head_size
    sizes = {
        "q_proj": (hidden, query),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (query, hidden),
    }
    made = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name in PROJECTIONS:
            of_input, of_output = sizes[name]
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, of_input, generator=made) * 0.2
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(of_output, rank, generator=made) * 0.2
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "r": rank,
        "target_modules": list(PROJECTIONS),
    }
    (directory / "adapter_config.json").write_text(json.dumps(described, indent=2))
    return directory
