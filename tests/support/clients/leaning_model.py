"""A tiny random model that knows tools and leans towards ends: of strings, of values, of its answer.

    python tests/support/clients/leaning_model.py DIR

What it says has no sense. But a schema's unbounded string ends soon, so that clients which bound nothing get
whole answers from it, and free text ends without ``max_tokens``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.gateway.gateway_world import special_id
from tests.support.gateway.talking_model import MARKERS, make_talking_model, talking_tokenizer

CONTEXT = 16_384
MAX_NEW_TOKENS = 512
"""Of a request that names no bound."""
STEADY = 18.0
"""Of one dimension, in every token's embedding: what the head sees of it is the same at all positions."""
READS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
WRITES = ("o_proj.weight", "down_proj.weight")
"""What would change that dimension, or be drowned by it."""
LEANING = {
    '"': 9.5,
    "}": 6.0,
    "]": 6.0,
    "<|im_end|>": 7.5,
    "<|im_start|>": -30.0,
    **dict.fromkeys(MARKERS, -30.0),
}
"""By how much a token's logit is raised."""


def make_leaning_model(directory: Path) -> Path:
    tokenizer = talking_tokenizer()
    make_tiny_model(
        directory,
        vocab=tokenizer.get_vocab_size(),
        tie_word_embeddings=False,
        max_position_embeddings=CONTEXT,
    )
    (directory / "chat_template.jinja").unlink()
    make_talking_model(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = STEADY
        for name, weight in model.model.layers.named_parameters():
            if name.endswith(READS):
                weight[:, 0] = 0.0
            if name.endswith(WRITES):
                weight[0] = 0.0
        model.model.norm.weight[0] = 1.0
        sample = torch.arange(tokenizer.get_vocab_size()).unsqueeze(0)
        seen = model.model(sample).last_hidden_state[..., 0].mean()
        head = model.lm_head.weight
        head[:, 0] = 0.0
        for token, raised in LEANING.items():
            if (token_id := tokenizer.token_to_id(token)) is not None:
                head[token_id, 0] = raised / seen
    model.save_pretrained(directory)
    generation = {
        "eos_token_id": [special_id(tokenizer, "<|im_end|>")],
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


if __name__ == "__main__":
    print(make_leaning_model(Path(sys.argv[1])))
