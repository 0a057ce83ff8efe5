"""A model whose every token proves that the right KV was read.

It has a transformer's data flow: a token's K and V in a layer are hashes of its hidden state, and its next
hidden state is a hash of all K and V rows up to itself, *read back from the blocks*. One wrong, stale,
missing or shifted row changes every later token, so a mistake in blocks, transfers or scheduling shows as a
wrong token. No torch, microseconds a token.

Rows are 8 bytes: ``KvLayout(num_kv_heads=1, head_dim=2, dtype="float32")``; or these 8 bytes several times
over, so that a codec makes them smaller. Tokens are the same for any width, as long as all times are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import InternalError
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.protocol.messages.request.prompt_logprobs import (
    FIRST_POSITION,
    PromptLogprob,
    PromptLogprobs,
    packed,
)
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import (
    Batch,
    Chunk,
    Sampled,
    SampleSpec,
    Scored,
    ScoreSpec,
    StepResult,
)
from microserve.services.simulation.engine.toy_guides import toy_guide

ROW_NBYTES = 8


REVISION = "hash-runner-2"
"""What its "weights" are: raised when it computes other KV."""
HASH = Numerics("hash-2", is_exact=True)
"""Its numerics class: a row is what its context is, in whatever company."""


def hash_layout(
    *, num_blocks: int, block_size: int = 4, num_layers: int = 2, model: str = "hash", width: int = 1
) -> KvLayout:
    """The geometry that this runner needs; ``width``: how many times over a row is."""
    return KvLayout(
        model=model,
        num_layers=num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=1,
        head_dim=2 * width,
        dtype="float32",
        revision=REVISION,
    )


def _digest(*parts: bytes, nbytes: int = ROW_NBYTES) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=nbytes).digest()


@cache
def _embedding(token: int) -> bytes:
    """What a token's hidden state is at first."""
    return _digest(token.to_bytes(4, "little"))


class HashRunner:
    """Runs batches on the data region of a heap, as the real runner does."""

    def __init__(
        self,
        data: npt.NDArray[np.uint8],
        layout: KvLayout,
        *,
        vocab_size: int,
        numerics: Numerics = UNKNOWN,
    ) -> None:
        self.numerics = numerics
        if layout.row_nbytes % ROW_NBYTES:
            raise InternalError(f"rows of {layout.row_nbytes} bytes, this runner needs {ROW_NBYTES}")
        self._row_nbytes, self._width = layout.row_nbytes, layout.row_nbytes // ROW_NBYTES
        self._kv = data.data
        self._layout = layout
        self._layer_nbytes, self._block_nbytes = layout.layer_nbytes, layout.block_nbytes
        self._half_nbytes = layout.half_nbytes
        self._vocab_size = vocab_size
        self.num_tokens = 0
        """Tokens computed so far: what a cache hit saves."""

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        self.num_tokens += sum(len(chunk.token_ids) for chunk in batch.chunks)
        states = [[_embedding(token) for token in chunk.token_ids] for chunk in batch.chunks]
        for layer in range(self._layout.num_layers):
            for chunk, state in zip(batch.chunks, states, strict=True):
                self._write(layer, chunk, state)
            if on_layer is not None:
                on_layer(layer)
            states = [self._attend(layer, c, s) for c, s in zip(batch.chunks, states, strict=True)]
        sampled = [self._sample(c, s[-1]) for c, s in zip(batch.chunks, states, strict=True)]
        each = enumerate(zip(batch.chunks, states, strict=True))
        return StepResult(sampled, {i: self._score(c.score, s) for i, (c, s) in each if c.score is not None})

    def _score(self, spec: ScoreSpec, state: list[bytes]) -> Scored:
        """Like a token's, of all rows up to the one that it is behind."""
        rows = []
        for hidden, target in zip(state[spec.first :], spec.targets, strict=False):
            number = int.from_bytes(_digest(hidden[:ROW_NBYTES]), "little")
            own = int.from_bytes(_digest(hidden[:ROW_NBYTES], b"%d" % target), "little") % 1000
            top = [((number + place) % self._vocab_size, -0.25 * place) for place in range(spec.num_top)]
            rows.append(PromptLogprob(-own / 8, 1 + own, tuple(top)))
        return Scored(packed(FIRST_POSITION, spec.num_top, rows).rows, spec.num_top)

    def _write(self, layer: int, chunk: Chunk, state: list[bytes]) -> None:
        size, base, kv = self._layout.block_size, layer * self._layer_nbytes, self._kv
        row_nbytes, width = self._row_nbytes, self._width
        for position, hidden in enumerate(state, start=chunk.start):
            if position >= chunk.write_from:
                row = _digest(b"kv", hidden, nbytes=2 * ROW_NBYTES)
                start = base + chunk.block_table[position // size] * self._block_nbytes
                start += position % size * row_nbytes
                kv[start : start + row_nbytes] = row[:ROW_NBYTES] * width
                start += self._half_nbytes
                kv[start : start + row_nbytes] = row[ROW_NBYTES:] * width

    def _attend(self, layer: int, chunk: Chunk, state: list[bytes]) -> list[bytes]:
        """What each token makes of all KV up to itself, as the blocks hold it now: of every whole block
        before its own, then of the rows of its own. So it is the same however a prompt is cut into chunks."""
        size, base, kv = self._layout.block_size, layer * self._layer_nbytes, self._kv
        block_nbytes, half_nbytes = self._block_nbytes, self._half_nbytes
        starts = [base + block * block_nbytes for block in chunk.block_table]
        whole = [self._once(kv[start : start + block_nbytes]) for start in starts[: chunk.start // size]]
        before = hashlib.blake2b(b"".join(whole), digest_size=ROW_NBYTES)
        out = []
        for position, hidden in enumerate(state, start=chunk.start):
            start, nbytes = starts[position // size], (position % size + 1) * self._row_nbytes
            seen = before.copy()
            seen.update(self._once(kv[start : start + nbytes]))
            seen.update(self._once(kv[start + half_nbytes : start + half_nbytes + nbytes]))
            out.append(_digest(hidden, seen.digest()))
            if nbytes == half_nbytes:
                before.update(self._once(kv[start : start + block_nbytes]))
        return out

    def _once(self, rows: memoryview) -> memoryview | bytes:
        """Of rows as they are, one time of each; of others all that there is."""
        if self._width == 1:
            return rows
        times = np.frombuffer(rows, np.uint8).reshape(-1, self._width, ROW_NBYTES)
        return times[:, 0].tobytes() if (times == times[:, :1]).all() else rows

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
        if spec.allowed is not None:
            allowed = np.flatnonzero(np.unpackbits(spec.allowed.view(np.uint8), bitorder="little"))
            return Sampled(int(allowed[number % len(allowed)]), logprob, [])
        return Sampled(number % self._vocab_size, logprob, [])


MakeRunner = Callable[[npt.NDArray[np.uint8], KvLayout, int], HashRunner]
"""From the data region, its layout and the size of the vocabulary."""


def plain(data: npt.NDArray[np.uint8], layout: KvLayout, vocab_size: int) -> HashRunner:
    return HashRunner(data, layout, vocab_size=vocab_size)


def expected_samples(
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    vocab_size: int,
    num_layers: int = 2,
    block_size: int = 4,
    width: int = 1,
    make_runner: MakeRunner = plain,
) -> list[Sampled]:
    """What any mesh with blocks of ``block_size`` tokens, which count in what this runner computes, must
    answer: one sequence alone, whole prompt at once, no cache (eos is ignored)."""
    total = len(prompt) + params.max_tokens
    num_blocks = -(-total // block_size)
    layout = hash_layout(num_blocks=num_blocks, num_layers=num_layers, block_size=block_size, width=width)
    runner = make_runner(np.zeros(layout.data_nbytes, np.uint8), layout, vocab_size)
    tokens, start = list(prompt), 0
    table = list(range(layout.num_blocks))
    samples: list[Sampled] = []
    guide = toy_guide(params, vocab_size) if params.grammar is not None else None
    while len(tokens) < total:
        output = tokens[len(prompt) :]
        spec = SampleSpec(params, tokens[: len(prompt)], output, frozenset())
        spec.allowed = guide.allowed(output) if guide is not None else None
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
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    vocab_size: int,
    num_layers: int = 2,
    block_size: int = 4,
    width: int = 1,
) -> list[int]:
    """The tokens of :func:`expected_samples`."""
    samples = expected_samples(
        prompt,
        params,
        vocab_size=vocab_size,
        num_layers=num_layers,
        block_size=block_size,
        width=width,
    )
    return [sampled.token_id for sampled in samples]


def expected_rows(
    prompt: Sequence[int],
    num_top: int,
    *,
    vocab_size: int,
    num_layers: int = 2,
    block_size: int = 4,
    make_runner: MakeRunner = plain,
) -> PromptLogprobs:
    """What any mesh must tell of a prompt's own tokens: all of it at once, alone, without a cache."""
    layout = hash_layout(
        num_blocks=-(-len(prompt) // block_size), num_layers=num_layers, block_size=block_size
    )
    runner = make_runner(np.zeros(layout.data_nbytes, np.uint8), layout, vocab_size)
    if len(prompt) == 1:
        return PromptLogprobs(FIRST_POSITION, num_top, b"")
    spec = ScoreSpec(0, list(prompt[1:]), num_top)
    chunk = Chunk(0, list(prompt), 0, list(range(layout.num_blocks)), 0, None, spec)
    return PromptLogprobs(FIRST_POSITION, num_top, runner.execute(Batch([chunk])).scored[0].rows)
