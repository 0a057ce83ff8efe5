"""The model that is measured, random weights in the dimensions of a real one, and what its work amounts to.

Owns dimensions and the counts that follow from them. Operations: a multiplication and an addition are two.
Must not know devices or times.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

NBYTES = 2
"""bf16: weights and KV."""


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @property
    def layer_matrix_values(self) -> int:
        """Weights of one layer's matrices: Q, K, V, O; gate, up, down."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden * (2 * query + 2 * kv + 3 * self.intermediate)

    @property
    def read_weights_nbytes(self) -> int:
        """What every step reads: all weights but the embedding, of which it reads a row for each token."""
        norms = 2 * self.num_layers + 1
        values = self.num_layers * self.layer_matrix_values + (norms + self.vocab) * self.hidden
        return values * NBYTES

    @property
    def token_kv_nbytes(self) -> int:
        """K and V of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * NBYTES

    def prefill_operations(self, num_tokens: int) -> int:
        """Of a prompt alone in its step, with one row of logits; the token at p attends to p + 1 tokens."""
        matrices = 2 * num_tokens * self.num_layers * self.layer_matrix_values
        pairs = num_tokens * (num_tokens + 1) // 2
        attention = self.num_layers * 4 * self.num_heads * self.head_dim * pairs
        return matrices + attention + 2 * self.hidden * self.vocab

    def decode_nbytes(self, num_context_tokens: int) -> int:
        """Read by one decode step whose sequences have so many tokens together."""
        return self.read_weights_nbytes + num_context_tokens * self.token_kv_nbytes

    def write(self, directory: Path) -> Path:
        """Make it a model directory for ``load_format = "random"``, and return it."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "dtype": "bfloat16",
        }
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
        return directory


LLAMA_8B = Shape("Llama-3.1-8B", 4096, 32, 32, 8, 128, 14336, 128256)
TINY = Shape("tiny", 256, 3, 4, 2, 64, 384, 320)
