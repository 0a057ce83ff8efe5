"""Where the KV of a token lies in a heap's data region.

    data   [layer][block][K | V][row][head][dim]      row = token % block_size

K and V of one block are neighbours, so a whole block of one layer is one copy; a part of a block is two.
That is the order ``rows``. Of an engine whose blocks are somebody else's we know only that a block of one
layer is so many bytes at one place: its ``order`` is a name, equal for equal insides, and only whole blocks
are copied.

The state of a request of a hybrid model, which has a fixed size, takes whole blocks of the same pool: byte
``i`` of its state in a layer is byte ``i`` of that layer of its state blocks.

Owns this arithmetic, and the rule when two engines may exchange KV (``layout_hash``). Knows no memory,
no grants and no tensors; the control words are in words.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import ClassVar

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.kv.geometry import Geometry

ROWS = "rows"
"""The order inside a block that is known here."""
K, V = 0, 1
"""Which half of a block: ``offset(layer, block, K, row)``."""

_DTYPE_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KvLayout(msgspec.Struct, frozen=True):
    """Geometry of one engine's KV pool. :class:`ConfigError` names a field that is out of bounds."""

    model: str
    num_layers: int
    num_blocks: int
    block_size: int
    """Tokens in a block."""
    num_kv_heads: int
    head_dim: int
    dtype: str
    """``float32``, ``bfloat16`` or ``float16``."""
    revision: str = ""
    """Digest of the model that was loaded: what the name stands for; empty where nobody says."""
    order: str = ROWS
    """What lies where inside a block of one layer: ``rows``, as above, or the name of another order."""
    rope: str = ""
    """The model's RoPE in words; empty where nobody says."""
    state_nbytes: int = 0
    """Of a request in each layer, beside its KV: what a hybrid model's layers without KV keep of it."""

    MAX_TOKENS: ClassVar[int] = 1 << 31
    """Token counts share a word with a generation (words.py)."""

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_blocks", "block_size", "num_kv_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}, at least 1", field=field)
        if self.state_nbytes < 0 or (self.state_nbytes and not self.has_rows):
            raise ConfigError(f"state_nbytes is {self.state_nbytes} of {self.order!r}", field="state_nbytes")
        if self.dtype not in _DTYPE_NBYTES:
            raise ConfigError(f"dtype is {self.dtype!r}, one of {sorted(_DTYPE_NBYTES)}", field="dtype")
        if not self.order:
            raise ConfigError("order is empty", field="order")
        if self.num_blocks * self.block_size >= self.MAX_TOKENS:
            raise ConfigError(f"num_blocks * block_size is not below {self.MAX_TOKENS}", field="num_blocks")

    @property
    def has_rows(self) -> bool:
        """A token's K and V are rows that can be copied alone; else whole blocks only."""
        return self.order == ROWS

    @property
    def row_nbytes(self) -> int:
        """K, or V, of one token in one layer."""
        return self.num_kv_heads * self.head_dim * _DTYPE_NBYTES[self.dtype]

    @property
    def half_nbytes(self) -> int:
        """K, or V, of one block in one layer."""
        return self.block_size * self.row_nbytes

    @property
    def block_nbytes(self) -> int:
        """K and V of one block in one layer."""
        return 2 * self.half_nbytes

    @property
    def num_state_blocks(self) -> int:
        """Blocks that hold the state of one request: byte ``i`` of a layer's state is byte ``i`` of
        theirs."""
        return -(-self.state_nbytes // self.block_nbytes)

    @property
    def layer_nbytes(self) -> int:
        return self.num_blocks * self.block_nbytes

    @property
    def data_nbytes(self) -> int:
        return self.num_layers * self.layer_nbytes

    @property
    def layout_hash(self) -> str:
        """Equal for two engines that may exchange KV: everything but the size of the pool."""
        return _layout_hash(self)

    @property
    def geometry(self) -> Geometry:
        """What another engine's must equal, field by field; model and revision are not in it."""
        return Geometry(
            dtype=self.dtype,
            order=self.order,
            block_size=self.block_size,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope=self.rope,
            layers=f"state {self.state_nbytes}" if self.state_nbytes else "",
        )

    def offset(self, layer: int, block: int, kv: int, row: int) -> int:
        """Bytes from the start of the data region to a row, or (K, row 0) to a block. The caller keeps to the
        bounds, and to blocks where there are no rows."""
        return (
            layer * self.layer_nbytes
            + block * self.block_nbytes
            + kv * self.half_nbytes
            + row * self.row_nbytes
        )

    def num_grant_blocks(self, matched: int, end: int) -> int:
        """Blocks of a grant of tokens ``[matched, end)``: of their KV, then those of the state at ``end``,
        if the model has one and there is something to send."""
        return self.num_blocks_for(end - matched) + (self.num_state_blocks if matched < end else 0)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)


@lru_cache(maxsize=64)
def _layout_hash(layout: KvLayout) -> str:
    """Asked for with every grant and every send."""
    geometry = (layout.num_layers, layout.block_size, layout.num_kv_heads, layout.head_dim, layout.dtype)
    order = () if layout.has_rows else (layout.order,)  # what hashed rows before hashes them still
    state = ("state", layout.state_nbytes) if layout.state_nbytes else ()
    parts = ("kv-layout-2", layout.model, layout.revision, *geometry, *order, *state)
    return hashlib.sha256(msgspec.msgpack.encode(parts)).hexdigest()[:16]


def block_spans(
    blocks: Sequence[int], origin: int, lo: int, hi: int, block_size: int
) -> Iterator[tuple[int, int, int]]:
    """The rows of tokens ``[lo, hi)`` as ``(block, first row, number of rows)``, in token order.

    ``blocks[0]`` starts at token ``origin``, a multiple of ``block_size``; ``lo >= origin``.
    """
    token = lo
    while token < hi:
        row = token % block_size
        num_rows = min(block_size - row, hi - token)
        yield blocks[(token - origin) // block_size], row, num_rows
        token += num_rows
