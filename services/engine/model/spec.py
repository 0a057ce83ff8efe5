"""What the rest of an engine has to know of a model, whatever computes it. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the rest of the engine has to know of a model."""

    name: str
    """The directory's name."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    """Positions that the model was made for."""
    eos_token_ids: frozenset[int]
    dtype: str
    """``float32``, ``bfloat16`` or ``float16``: of weights and KV."""
    sliding_windows: frozenset[int | None]
    """Of its layers; None: of layers that see everything."""
    revision: str = ""
    """Digest of what was loaded (revision.py)."""
    rope: str = ""
    """Of its config, in words (directory/families.py)."""
