"""The rows of a step: what a batch's chunks are in arrays, and whether they fit model and pool.

Owns that packing. Must not know what computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from microserve.protocol.errors import InternalError
from microserve.services.engine.core.batch import Chunk, Sampled, SampleSpec, Scored, ScoreSpec, StepResult
from microserve.services.engine.model.spec import ModelSpec

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """chunk 0 | chunk 1 | ..., positions restart with each chunk."""

    tokens: _Ints
    positions: _Ints
    slots: _Ints
    """Where each token's KV goes, ``block * block_size + row``; -1 for those below ``write_from``."""
    wanted: _Ints
    """Rows whose logits are wanted, ascending."""
    sampled: _Ints
    """Of ``wanted``, the places of rows that are sampled from; those of the others are ``scored``."""
    specs: list[SampleSpec]
    """Of the rows that are sampled from."""
    scored: _Ints
    scores: list[ScoreSpec]
    """Of chunk after chunk, the rows that are scored."""

    @property
    def has_scores(self) -> bool:
        return bool(self.scores)


def rows_of(chunks: Sequence[Chunk], spec: ModelSpec, num_blocks: int, block_size: int) -> Rows:
    """Raises :class:`InternalError` for a chunk that does not fit the model or the pool."""
    for chunk in chunks:
        _check(chunk, spec, num_blocks, block_size)
    last = np.cumsum([len(chunk.token_ids) for chunk in chunks]) - 1
    sampled = last[[chunk.sample is not None for chunk in chunks]]
    scores = [chunk.score for chunk in chunks if chunk.score is not None]
    wanted, sampled_at, scored_at = sampled, np.arange(len(sampled)), np.empty(0, np.int64)
    if scores:
        scored = np.concatenate(
            [_scored(int(end), chunk) for end, chunk in zip(last, chunks, strict=True) if chunk.score]
        )
        wanted = np.sort(np.concatenate([sampled, scored]))
        sampled_at, scored_at = np.searchsorted(wanted, sampled), np.searchsorted(wanted, scored)
    return Rows(
        np.concatenate([np.asarray(chunk.token_ids, dtype=np.int64) for chunk in chunks]),
        np.concatenate([_positions(chunk) for chunk in chunks]),
        np.concatenate([_slots(chunk, block_size) for chunk in chunks]),
        wanted,
        sampled_at,
        [chunk.sample for chunk in chunks if chunk.sample is not None],
        scored_at,
        scores,
    )


def result_of(chunks: Sequence[Chunk], drawn: Sequence[Sampled], scored: Sequence[Scored] = ()) -> StepResult:
    """``drawn``: of the chunks that sample, in their order; ``scored``: of those that are scored."""
    each = iter(drawn)
    sampled = [next(each) if chunk.sample is not None else None for chunk in chunks]
    if not scored:
        return StepResult(sampled)
    places = [place for place, chunk in enumerate(chunks) if chunk.score is not None]
    return StepResult(sampled, dict(zip(places, scored, strict=True)))


def _scored(last: int, chunk: Chunk) -> _Ints:
    """Rows of the step that are scored for a chunk whose last row is ``last``."""
    assert chunk.score is not None
    first = last + 1 - len(chunk.token_ids) + chunk.score.first
    return np.arange(first, first + len(chunk.score.targets))


def _check(chunk: Chunk, spec: ModelSpec, num_blocks: int, block_size: int) -> None:
    end = chunk.start + len(chunk.token_ids)
    table = chunk.block_table
    score = chunk.score
    problem = None
    if not chunk.token_ids or chunk.start < 0 or end > spec.max_model_len:
        problem = f"positions [{chunk.start}, {end}) are not within [0, {spec.max_model_len})"
    elif min(chunk.token_ids) < 0 or max(chunk.token_ids) >= spec.vocab_size:
        problem = f"a token id is not below {spec.vocab_size}"
    elif len(table) * block_size < end:
        problem = f"{len(table)} blocks of {block_size} do not hold {end} tokens"
    elif min(table) < 0 or max(table) >= num_blocks:
        problem = f"a block is not below {num_blocks}"
    elif score is not None and not 0 <= score.first < score.first + len(score.targets) <= len(
        chunk.token_ids
    ):
        problem = f"rows [{score.first}, +{len(score.targets)}) are not within its {len(chunk.token_ids)}"
    elif score is not None and (min(score.targets) < 0 or max(score.targets) >= spec.vocab_size):
        problem = f"a scored token id is not below {spec.vocab_size}"
    if problem is not None:
        raise InternalError(f"chunk of sequence {chunk.sequence_id}: {problem}")


def _slots(chunk: Chunk, block_size: int) -> _Ints:
    positions = _positions(chunk)
    blocks = np.asarray(chunk.block_table, dtype=np.int64)[positions // block_size]
    return np.where(positions < chunk.write_from, -1, blocks * block_size + positions % block_size)


def _positions(chunk: Chunk) -> _Ints:
    return np.arange(chunk.start, chunk.start + len(chunk.token_ids), dtype=np.int64)
