"""What gpu.py measures and how often: in full, quickly, and as a trial that any machine can run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpu_parts import timing
from gpu_parts.engine import BLOCK_SIZE
from gpu_parts.shape import LLAMA_8B, TINY, Shape


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and how often."""

    shape: Shape
    transfers: dict[int, int]
    """Tokens of a prompt: rounds."""
    decodes: dict[int, float]
    """Sequences: goal, as part of the bandwidth bound."""
    decode_context: int
    decode_steps: int
    prefill_tokens: int
    migration_tokens: int
    rounds: int
    """Of prefill, migration and ceilings."""
    step_tokens: int
    """In one step at most."""
    ceiling_nbytes: int = timing.CEILING_NBYTES
    matmul_size: int = timing.MATMUL_SIZE
    warm_up_steps: int = 8

    @property
    def num_blocks(self) -> int:
        """Of the sender: twice its longest prompt (the prefix cache keeps the last), or all that decodes."""
        decoding = max(self.decodes) * (self.decode_context + 3 * self.decode_steps + 64)
        longest = max(*self.transfers, self.prefill_tokens, self.migration_tokens)
        return -(-max(decoding, 2 * longest) // BLOCK_SIZE) + 64

    @property
    def num_receiver_blocks(self) -> int:
        """Grants may take half of a pool."""
        return 2 * (-(-max(*self.transfers, self.migration_tokens) // BLOCK_SIZE) + 8)


FULL = Plan(
    shape=LLAMA_8B,
    transfers={3000: 15, 32000: 5},
    decodes={1: 0.75, 64: 0.65},
    decode_context=1024,
    decode_steps=64,
    prefill_tokens=8192,
    migration_tokens=3000,
    rounds=11,
    step_tokens=8192,
)
QUICK = replace(FULL, transfers={3000: 3, 32000: 1}, decode_steps=16, rounds=3)
TRIAL = Plan(
    shape=TINY,
    transfers={40: 2, 150: 2},
    decodes={1: 0.75, 3: 0.65},
    decode_context=32,
    decode_steps=4,
    prefill_tokens=96,
    migration_tokens=40,
    rounds=2,
    step_tokens=128,
    ceiling_nbytes=1 << 20,
    matmul_size=64,
    warm_up_steps=2,
)
