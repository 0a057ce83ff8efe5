"""Plain-torch oracle of every operation in this folder: one token and one head at a time.

Owns the meaning of the operations; the fast versions are tested against it. Must not know speed, nor any
code of the fast versions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def write_kv(kv: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write one layer's new keys and values into their blocks.

    kv: [num_blocks, 2, block_size, num_kv_heads, head_dim]; key, value: [T, num_kv_heads, head_dim];
    slots: [T] int64, ``block * block_size + row``, or -1 for a token that is not written.
    """
    block_size = kv.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, row = divmod(slot, block_size)
            kv[block, 0, row] = key[token]
            kv[block, 1, row] = value[token]


def paged_attention(
    query: Tensor,
    kv: Tensor,
    sequences: Sequence[tuple[int, int, Sequence[int]]],
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of packed queries over paged keys and values, in float64.

    query: [T, num_heads, head_dim], the sequences' new tokens one after the other; sequences: for each one
    (query_len, context_len, block_table), where context_len includes the new tokens. The token at position
    p sees [0, p], or (p - sliding_window, p]. Returns [T, num_heads, head_dim] in the query's dtype.
    """
    num_heads, block_size, num_kv_heads = query.shape[1], kv.shape[2], kv.shape[3]
    out = torch.empty_like(query)
    token = 0
    for query_len, context_len, block_table in sequences:
        for position in range(context_len - query_len, context_len):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            rows = [divmod(seen, block_size) for seen in range(first, position + 1)]
            keys = torch.stack([kv[block_table[block], 0, row] for block, row in rows]).double()
            values = torch.stack([kv[block_table[block], 1, row] for block, row in rows]).double()
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                scores = (keys[:, kv_head] @ query[token, head].double()) * scale
                weights = torch.softmax(scores, dim=0)
                out[token, head] = (weights @ values[:, kv_head]).to(query.dtype)
            token += 1
    return out
