"""A model whose every token proves that the right KV was read.

It has a transformer's data flow: a token's K and V in a layer are hashes of its hidden state, and its next
hidden state is a hash of all K and V rows up to itself, *read back from the blocks*. One wrong, stale,
missing or shifted row changes every later token, so a mistake in blocks, transfers or scheduling shows as a
wrong token. No torch, microseconds a token.

Rows are 8 bytes: ``KvLayout(num_kv_heads=1, head_dim=2, dtype="float32")``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import InternalError
from microserve.protocol.messages.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, Sampled, SampleSpec, StepResult

ROW_NBYTES = 8


REVISION = "hash-runner-1"
"""What its "weights" are: raised when it computes other KV."""


def hash_layout(
    *, num_blocks: int, block_size: int = 4, num_layers: int = 2, model: str = "hash"
) -> KvLayout:
    """The geometry that this runner needs."""
    return KvLayout(
        model=model,
        num_layers=num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=1,
        head_dim=2,
        dtype="float32",
        revision=REVISION,
    )


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=8).digest()


class HashRunner:
    """Runs batches on the data region of a heap, as the real runner does."""

    def __init__(self, data: npt.NDArray[np.uint8], layout: KvLayout, *, vocab_size: int) -> None:
        if layout.row_nbytes != ROW_NBYTES:
            raise InternalError(f"rows of {layout.row_nbytes} bytes, this runner needs {ROW_NBYTES}")
        shape = (layout.num_layers, layout.num_blocks, 2, layout.block_size, ROW_NBYTES)
        self._kv = data[: layout.data_nbytes].reshape(shape)
        self._layout = layout
        self._vocab_size = vocab_size
        self.num_tokens = 0
        """Tokens computed so far: what a cache hit saves."""

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        self.num_tokens += sum(len(chunk.token_ids) for chunk in batch.chunks)
        states = [
            [_digest(token.to_bytes(4, "little")) for token in chunk.token_ids] for chunk in batch.chunks
        ]
        for layer in range(self._layout.num_layers):
            for chunk, state in zip(batch.chunks, states, strict=True):
                self._write(layer, chunk, state)
            if on_layer is not None:
                on_layer(layer)
            states = [self._attend(layer, c, s) for c, s in zip(batch.chunks, states, strict=True)]
        return StepResult([self._sample(c, s[-1]) for c, s in zip(batch.chunks, states, strict=True)])

    def _write(self, layer: int, chunk: Chunk, state: list[bytes]) -> None:
        size = self._layout.block_size
        for index, hidden in enumerate(state):
            position = chunk.start + index
            if position >= chunk.write_from:
                block, row = chunk.block_table[position // size], position % size
                self._kv[layer, block, 0, row] = np.frombuffer(_digest(b"k", hidden), np.uint8)
                self._kv[layer, block, 1, row] = np.frombuffer(_digest(b"v", hidden), np.uint8)

    def _attend(self, layer: int, chunk: Chunk, state: list[bytes]) -> list[bytes]:
        """What each token makes of all KV up to itself, as the blocks hold it now."""
        size = self._layout.block_size
        end = chunk.start + len(state)
        blocks = np.array(chunk.block_table[: -(-end // size)], np.int64)
        # [blocks, K|V, row, bytes] -> a row of K then V per token
        rows = self._kv[layer, blocks].transpose(0, 2, 1, 3).reshape(-1, 2 * ROW_NBYTES)
        seen = hashlib.blake2b(rows[: chunk.start].tobytes(), digest_size=8)
        out = []
        for index, hidden in enumerate(state):
            seen.update(rows[chunk.start + index].tobytes())
            out.append(_digest(hidden, seen.digest()))
        return out

    def _sample(self, chunk: Chunk, hidden: bytes) -> Sampled | None:
        """Greedy depends on the context alone; sampling also on (seed, position), as the real sampler's."""
        spec = chunk.sample
        if spec is None:
            return None
        key = b""
        if spec.params.temperature > 0.0:
            position = len(spec.prompt_token_ids) + len(spec.output_token_ids)
            key = b"%d:%d" % (spec.params.seed, position)
        number = int.from_bytes(_digest(hidden, key), "little")
        logprob = -float(number % 1000) / 100 if spec.params.logprobs is not None else None
        return Sampled(number % self._vocab_size, logprob, [])


def expected_samples(
    prompt: Sequence[int], params: SamplingParams, *, vocab_size: int, num_layers: int = 2
) -> list[Sampled]:
    """What any mesh must answer: one sequence alone, whole prompt at once, no cache (eos is ignored)."""
    total = len(prompt) + params.max_tokens
    layout = hash_layout(num_blocks=-(-total // 4), num_layers=num_layers)
    runner = HashRunner(np.zeros(layout.data_nbytes, np.uint8), layout, vocab_size=vocab_size)
    tokens, start = list(prompt), 0
    table = list(range(layout.num_blocks))
    samples: list[Sampled] = []
    while len(tokens) < total:
        spec = SampleSpec(params, tokens[: len(prompt)], tokens[len(prompt) :], frozenset())
        sampled = runner.execute(Batch([Chunk(0, tokens[start:], start, table, start, spec)])).sampled[0]
        if sampled is None:
            raise InternalError("nothing was sampled")
        start = len(tokens)
        tokens.append(sampled.token_id)
        samples.append(sampled)
        if sampled.token_id in params.stop_token_ids:
            break
    return samples


def expected_tokens(
    prompt: Sequence[int], params: SamplingParams, *, vocab_size: int, num_layers: int = 2
) -> list[int]:
    """The tokens of :func:`expected_samples`."""
    samples = expected_samples(prompt, params, vocab_size=vocab_size, num_layers=num_layers)
    return [sampled.token_id for sampled in samples]
