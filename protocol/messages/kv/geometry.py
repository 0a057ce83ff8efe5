"""The shape of KV, as an engine says it: what must be equal before a byte moves (WIRE.md 4.6).

Plain data and the one rule of comparing. Does not know how blocks become addresses (kvcache/layout.py), nor
whose tokens they hold: model and revision are said elsewhere.
"""

from __future__ import annotations

import msgspec

MAX_ROPE_CHARS = 200
"""Longest text of RoPE's parameters; beyond it their digest."""


class Geometry(msgspec.Struct, frozen=True, array_like=True):
    """Of one token's KV and of a block of it, in all layers. An empty ``dtype``: not said."""

    dtype: str = ""
    """Of the elements: ``float32``, ``bfloat16``, ``float16``, or what the engine computes them by."""
    order: str = ""
    """What lies where inside a block of one layer, by a name: ``rows`` of the native engine."""
    block_size: int = 0
    """Tokens in a block."""
    num_layers: int = 0
    num_kv_heads: int = 0
    """In the heap that the grant is of: of an engine with several workers, those of one."""
    head_dim: int = 0
    quantization: str = ""
    """Of KV; empty: none."""
    rope: str = ""
    """RoPE's kind and parameters in words; empty: not said."""
    layers: str = ""
    """Digest of the list of layers, where they are not all of one kind; empty: they are, or not said."""

    @property
    def is_said(self) -> bool:
        """Does anybody say it? An older engine does not."""
        return bool(self.dtype)


UNSAID = Geometry()
_MAY_BE_UNSAID = ("rope", "layers")


def differing_field(one: Geometry, other: Geometry) -> str:
    """The first field in which they differ; empty: none, or one of the two says nothing."""
    if one == other or not (one.is_said and other.is_said):
        return ""
    for field in Geometry.__struct_fields__:
        mine, theirs = getattr(one, field), getattr(other, field)
        if mine != theirs and ((mine and theirs) or field not in _MAY_BE_UNSAID):
            return field
    return ""


def difference(here: Geometry, there: Geometry, *, ours: str = "here", theirs: str = "there") -> str:
    """The first field in which two engines differ, with both values: ``dtype: bfloat16 here, float32 there``.
    Empty: they may exchange KV, or one of them does not say."""
    field = differing_field(here, there)
    if not field:
        return ""
    return f"{field}: {getattr(here, field) or 'none'} {ours}, {getattr(there, field) or 'none'} {theirs}"
