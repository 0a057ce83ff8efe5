"""What the rest of an engine has to know of a model, whatever computes it. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor in the bytes that a request's state has in one layer of the pool."""

    begin: int
    """Where it starts among them; a multiple of 16."""
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * (4 if self.dtype == "float32" else 2)


@dataclass(frozen=True, slots=True)
class StateLayer:
    """What a layer without KV keeps of a request, however long that is."""

    layer: int
    """Of the model."""
    kv_layer: int
    """Of the pool: where its bytes are, and with which they travel."""
    tensors: tuple[StateTensor, ...]
    """The last inputs of its convolution, and its recurrent state where it has one."""


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Of a hybrid model, some of whose layers keep a state of fixed size instead of KV."""

    mixer: str
    """What such a layer is called in its block."""
    layers: tuple[StateLayer, ...]
    kv_layers: tuple[int, ...]
    """The model's layers that keep KV, in order: the layers of the pool."""
    nbytes: int
    """Of a request, in one layer of the pool."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the rest of the engine has to know of a model."""

    name: str
    """The directory's name."""
    num_layers: int
    """That keep KV: all but those of ``state``."""
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
    state: StateSpec | None = None
    """None: all layers keep KV."""

    @property
    def state_nbytes(self) -> int:
        """Of a request in one layer of the pool, beside its KV."""
        return self.state.nbytes if self.state is not None else 0
