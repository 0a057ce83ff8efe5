"""The attention of a GPU from ready tensors, as a captured graph holds it, on CPU tensors."""

from __future__ import annotations

import torch

from microserve.kernels.attention.gpu_attention import DeviceBatch
from microserve.services.engine.model.attention.step import DeviceAttention

BLOCK, NUM_HEADS, HEAD_DIM = 4, 2, 16


def rotated(num_tokens: int, num_heads: int) -> torch.Tensor:
    """Laid out as RoPE leaves it: a token's heads far from each other."""
    return torch.randn(num_heads, num_tokens, HEAD_DIM).transpose(0, 1)


def test_tokens_without_a_slot_are_not_written_and_places_without_a_sequence_are_zeros() -> None:
    torch.manual_seed(0)
    kv = torch.full((5, 2, BLOCK, NUM_HEADS, HEAD_DIM), float("nan"))
    batch = DeviceBatch(
        query_starts=torch.tensor([0, 1, 2, 2], dtype=torch.int32),
        context_lens=torch.tensor([1, 1, 0], dtype=torch.int32),
        block_tables=torch.tensor([[3], [1], [0]], dtype=torch.int32),
        num_decodes=3,
    )
    key, value, query = rotated(3, NUM_HEADS), rotated(3, NUM_HEADS), rotated(3, 2 * NUM_HEADS)
    kv[1, :, 0] = 2.0  # of a token that stands there already
    slots = torch.tensor([3 * BLOCK, -1, -1])
    attention = DeviceAttention(batch, slots)

    attention.write(kv, key, value)
    assert torch.equal(kv[3, :, 0], torch.stack([key[0], value[0]]))
    assert torch.equal(kv[1, :, 0], torch.full((2, NUM_HEADS, HEAD_DIM), 2.0))
    assert kv.isnan().sum() == kv.numel() - 2 * kv[3, :, 0].numel()

    # With one key in sight attention is its value, for each query head that shares the KV head.
    out = attention.attend(query, kv, scale=0.25, sliding_window=None)
    torch.testing.assert_close(out[0], value[0].repeat_interleave(2, 0))
    torch.testing.assert_close(out[1], torch.full((4, HEAD_DIM), 2.0))
    assert torch.equal(out[2], torch.zeros(4, HEAD_DIM))

    # The same objects serve the next step: what the tensors hold is read at the call.
    slots.copy_(torch.tensor([-1, 1 * BLOCK + 1, 4 * BLOCK + 3]))
    attention.write(kv, key, value)
    assert torch.equal(kv[1, :, 1], torch.stack([key[1], value[1]]))
    assert torch.equal(kv[4, :, 3], torch.stack([key[2], value[2]]))
