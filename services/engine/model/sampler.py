"""Logits to tokens, one row at a time, so that no row depends on what else is in the batch.

Owns the order in which decoding parameters act:

    raw logits (their log-softmax is what is reported) -> logit_bias -> repetition penalty -> presence and
    frequency penalties -> the grammar's mask, else min_tokens -> temperature -> top_k -> top_p -> min_p
    -> one draw

The draw is the Gumbel-max trick: the token with the highest logit plus noise of its own. The noise of a token
is a function of (seed, position, token) and nothing else, so a sequence that moves to another engine goes on
with the same tokens. Two engines' logits differ by rounding; with this draw that matters only when the best
two scores are as close as the rounding. (The inverse of the cumulative distribution has an edge at every
token, and among thousands of edges one is always close: it gave one other token in some thousand.) Must not
know models or sequences' states.

numpy, not torch: its argmax over a vocabulary is 6 (fp32) to 30 (bf16) times as fast on a CPU. Logits that
are on a GPU stay there: device_sampler.py does the same for all rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from microserve.kernels.philox import uniforms
from microserve.protocol.errors import InternalError, InvalidRequest, MeshError
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Sampled, SampleSpec
from microserve.services.engine.guidance.guide import Mask

if TYPE_CHECKING:
    from torch import Tensor

_Floats = npt.NDArray[np.float64]
_Ids = npt.NDArray[np.int64]

HUGE = 1e300

BLOCK = 256
"""Tokens of a large vocabulary that are looked at together for the likeliest."""
HEAD = 1024
"""Of a large vocabulary: tokens that are looked at first for top_p."""


def sample(logits: Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
    """:func:`sample_rows` of ``logits`` of any float dtype, on a CPU."""
    return sample_rows(logits.float().numpy(), specs) if specs else []


def sample_rows(raw: npt.NDArray[np.float32], specs: Sequence[SampleSpec]) -> list[Sampled]:
    """One token for each row of the logits ``raw`` [N, vocab_size]; N == len(specs).

    A row without a finite maximum gets an :class:`InternalError`, as its token would be garbage; one for
    which ``min_tokens`` and the stop ids leave no token an :class:`InvalidRequest`.
    """
    if not specs:
        return []
    likeliest = raw.argmax(axis=1)  # the first of equals; the first NaN, if there is one
    return [
        failure(float(row[token]), 0.0)
        or (
            Sampled(_greedy(row, int(token), spec), None, [])
            if is_plain_greedy(spec)
            else _sample_row(row, spec)
        )
        for row, token, spec in zip(raw, likeliest, specs, strict=True)
    ]


def failure(best: float, peak: float) -> Sampled | None:
    """What stands for a token where there is none. best: a row's highest logit; peak: its highest adjusted
    score."""
    error: MeshError
    if not math.isfinite(best):
        error = InternalError("the logits are not finite")
    elif peak == -math.inf:
        error = InvalidRequest("no token of the vocabulary may be chosen", field="min_tokens")
    else:
        return None
    return Sampled(-1, None, [], error)


def is_plain_greedy(spec: SampleSpec) -> bool:
    """It takes the likeliest token, whatever else there is to know."""
    params = spec.params
    return (
        params.temperature == 0.0
        and params.logprobs is None
        and not params.logit_bias
        and params.repetition_penalty == 1.0
        and params.presence_penalty == 0.0
        and params.frequency_penalty == 0.0
        and (spec.allowed is not None or len(spec.output_token_ids) >= params.min_tokens)
    )


def _greedy(raw: npt.NDArray[np.float32], likeliest: int, spec: SampleSpec) -> int:
    """The likeliest that may be chosen."""
    mask = spec.allowed
    if mask is None or mask[likeliest // 32] >> likeliest % 32 & 1:
        return likeliest
    allowed = allowed_tokens(mask)
    return int(allowed[raw[allowed].argmax()])


def _sample_row(raw: npt.NDArray[np.float32], spec: SampleSpec) -> Sampled:
    params = spec.params
    scores = _adjusted(raw, spec)
    token = int(scores.argmax())
    if (failed := failure(0.0, float(scores[token]))) is not None:
        return failed
    if params.temperature > 0.0:
        position = len(spec.prompt_token_ids) + len(spec.output_token_ids)
        token = _draw(scores, params, uniforms(params.seed, position, len(scores)))
    if params.logprobs is None:
        return Sampled(token, None, [])
    logprobs = log_softmax(raw)
    likeliest = likeliest_of(logprobs, params.logprobs)
    top = [(int(other), float(logprobs[other])) for other in likeliest]
    return Sampled(token, float(logprobs[token]), top)


def likeliest_of(logprobs: npt.NDArray[np.float32], count: int) -> _Ids:
    """The likeliest tokens, likeliest first; of equals the lower id."""
    found = _largest(logprobs, count)
    return found[np.argsort(-logprobs[found], kind="stable")]


def log_softmax(raw: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shifted = raw - raw.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), dtype=np.float32)


def _adjusted(raw: npt.NDArray[np.float32], spec: SampleSpec) -> _Floats:
    """A copy of the row with bias, penalties and forbidden tokens."""
    params = spec.params
    scores = raw.astype(np.float64)
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if params.repetition_penalty != 1.0:
        seen = seen_tokens(spec)
        held, penalty = scores[seen], params.repetition_penalty
        with np.errstate(over="ignore"):  # a penalty near 0 may not push a score out of the numbers
            held = np.clip(np.where(held > 0.0, held / penalty, held * penalty), -HUGE, HUGE)
        scores[seen] = held
    said, amounts = said_tokens(spec)
    scores[said] -= amounts
    if spec.allowed is not None:
        allowed = allowed_tokens(spec.allowed)
        held = scores[allowed]
        scores.fill(-np.inf)
        scores[allowed] = held
    scores[forbidden_tokens(spec, len(scores))] = -np.inf
    return scores


def allowed_tokens(mask: Mask) -> _Ids:
    """Of a mask, ascending. Most masks are of few words: only those are looked into."""
    words = np.flatnonzero(mask)
    bits = np.unpackbits(mask[words].astype("<u4").view(np.uint8), bitorder="little")
    places = np.flatnonzero(bits)
    return np.asarray(words[places // 32] * 32 + places % 32, dtype=np.int64)


def seen_tokens(spec: SampleSpec) -> _Ids:
    """In prompt or output; ascending, each once."""
    return np.unique(np.array([*spec.prompt_token_ids, *spec.output_token_ids], dtype=np.int64))


def said_tokens(spec: SampleSpec) -> tuple[_Ids, _Floats]:
    """Tokens of the output, each once, and what the penalties take from their scores; none without any."""
    params = spec.params
    if not (params.presence_penalty or params.frequency_penalty):
        return np.empty(0, dtype=np.int64), np.empty(0)
    said, counts = np.unique(np.array([*spec.output_token_ids], dtype=np.int64), return_counts=True)
    return said, params.presence_penalty + params.frequency_penalty * counts.astype(np.float64)


def forbidden_tokens(spec: SampleSpec, vocab_size: int) -> _Ids:
    """That would end the output before ``min_tokens``; each once. A mask has that in it."""
    if spec.allowed is not None or len(spec.output_token_ids) >= spec.params.min_tokens:
        return np.empty(0, dtype=np.int64)
    ends = {*spec.eos_token_ids, *spec.params.stop_token_ids}
    return np.array(sorted(token for token in ends if token < vocab_size), dtype=np.int64)


def _draw(scores: _Floats, params: SamplingParams, numbers: _Floats) -> int:
    """The kept token whose scaled score plus Gumbel noise is highest; of equals the lowest."""
    with np.errstate(over="ignore"):  # a far token's score is rightly minus infinity
        scaled = (scores - scores.max()) / params.temperature
    # Logarithms are slow: only for those that could beat the likeliest token with the best noise of all.
    bar = _gumbel(numbers[scaled.argmax()]) - _gumbel(numbers.max())
    if params.top_k or params.top_p < 1.0 or params.min_p > 0.0:
        with np.errstate(under="ignore"):
            weights = np.exp(scaled)
        # By the scores: weights that are equal may be of scores that are not.
        kept = _largest(scaled, *_num_kept(scaled, weights, params))
        kept = kept[
            (weights[kept] >= params.min_p) & (scaled[kept] >= bar)
        ]  # the likeliest one's weight is 1
    else:
        kept = np.flatnonzero(scaled >= bar)
    return int(kept[(scaled[kept] + _gumbel(numbers[kept])).argmax()])


def _gumbel(numbers: npt.NDArray[np.float64] | np.float64) -> npt.NDArray[np.float64]:
    return np.asarray(-np.log(-np.log(numbers)))


def _num_kept(scaled: _Floats, weights: _Floats, params: SamplingParams) -> tuple[int, float | None]:
    """How many of the likeliest tokens top_k leaves, and of these top_p: at least one. With it the score of
    the last of them, where it is known."""
    count = min(params.top_k or len(weights), len(weights))
    if params.top_p == 1.0:
        return count, None
    if count == len(weights) > 4 * HEAD:
        # Sorting a vocabulary is most of a draw, and the likeliest few hold nearly always enough.
        head = np.sort(np.partition(scaled, len(scaled) - HEAD)[-HEAD:])[::-1]
        with np.errstate(under="ignore"):
            reached = np.cumsum(np.exp(head))
        kept = int(np.searchsorted(reached, params.top_p * weights.sum(), side="left")) + 1
        if kept <= HEAD:
            return kept, float(head[kept - 1])
    reached = np.cumsum(np.sort(weights)[::-1][:count])
    return min(int(np.searchsorted(reached, params.top_p * reached[-1], side="left")) + 1, count), None


def _least_of_largest(values: npt.NDArray[np.floating], count: int) -> float:
    """The ``count``-th largest value. Of a large vocabulary few values are looked at twice: no less than as
    many as there are blocks whose greatest is as great."""
    blocks = len(values) // BLOCK
    if blocks > 4 * count:
        peaks = values[: blocks * BLOCK].reshape(blocks, BLOCK).max(axis=1)
        values = values[values >= np.partition(peaks, blocks - count)[blocks - count]]
    return float(np.partition(values, len(values) - count)[len(values) - count])


def _largest(values: npt.NDArray[np.floating], count: int, least: float | None = None) -> _Ids:
    """Indices, ascending, of the ``count`` largest values; among equals the lower indices. least: the last of
    those values, if it is known."""
    if count >= len(values):
        return np.arange(len(values))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    if least is None:
        least = _least_of_largest(values, count)
    above = values > least
    ties = np.flatnonzero(values == least)[: count - int(np.count_nonzero(above))]
    above[ties] = True
    return np.flatnonzero(above)
