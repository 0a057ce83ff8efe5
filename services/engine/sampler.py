"""Logits to tokens, one row at a time, so that no row depends on what else is in the batch.

Owns the order in which decoding parameters act:

    raw logits (their log-softmax is what is reported) -> logit_bias -> repetition penalty -> presence and
    frequency penalties -> min_tokens -> temperature -> top_k -> top_p -> min_p -> one draw

The draw is the Gumbel-max trick: the token with the highest logit plus noise of its own. The noise of a token
is a function of (seed, position, token) and nothing else, so a sequence that moves to another engine goes on
with the same tokens. Two engines' logits differ by rounding; with this draw that matters only when the best
two scores are as close as the rounding. (The inverse of the cumulative distribution has an edge at every
token, and among thousands of edges one is always close: it gave one other token in some thousand.) Must not
know models or sequences' states.

numpy, not torch: its argmax over a vocabulary is 6 (fp32) to 30 (bf16) times as fast on a CPU. From a GPU, a
step in which all take the likeliest token brings two numbers a row, others whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microserve.protocol.errors import InternalError, InvalidRequest
from microserve.protocol.sampling import SamplingParams
from microserve.services.engine.batch import Sampled, SampleSpec

_Floats = npt.NDArray[np.float64]
_Ids = npt.NDArray[np.int64]

_HUGE = 1e300


def sample(logits: Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
    """One token for each row of ``logits`` [N, vocab_size], any float dtype and device; N == len(specs).

    Raises :class:`InternalError` when a row has no finite maximum: its token would be garbage. Raises
    :class:`InvalidRequest` when ``min_tokens`` and the stop ids leave no token to choose.
    """
    if not specs:
        return []
    if logits.device.type != "cpu" and all(_is_plain_greedy(spec) for spec in specs):
        return _sample_there(logits)
    raw = logits.float().cpu().numpy()
    rows = np.arange(len(specs))
    likeliest = raw.argmax(axis=1)  # the first of equals; the first NaN, if there is one
    _require_finite(raw[rows, likeliest])
    return [
        Sampled(int(token), None, []) if _is_plain_greedy(spec) else _sample_row(row, spec)
        for row, token, spec in zip(raw, likeliest, specs, strict=True)
    ]


def uniforms(seed: int, position: int, count: int) -> _Floats:
    """The numbers in (0, 1), one for each of ``count`` tokens, that decide the token at ``position``
    (prompt tokens count).

    Word ``t`` of the stream of Philox4x64-10 with key ``seed`` and the counter's third word ``position``
    (numpy's generator steps the first word before it draws), its top 52 bits and a half as a fraction.
    """
    words = np.random.Philox(key=seed, counter=position << 128).random_raw(count)
    return np.asarray(((words >> np.uint64(12)) + 0.5) * 2.0**-52, dtype=np.float64)


def _sample_there(logits: Tensor) -> list[Sampled]:
    """The likeliest tokens, found where the logits are, with one wait for that device."""
    best, token = logits.max(dim=1)  # the first of equals; the first NaN
    found = torch.stack([best.double(), token.double()]).cpu().numpy()
    _require_finite(found[0])
    return [Sampled(int(token), None, []) for token in found[1]]


def _require_finite(best: npt.NDArray[np.floating]) -> None:
    broken = np.flatnonzero(~np.isfinite(best))
    if len(broken):
        raise InternalError(f"logits of rows {broken.tolist()} are not finite")


def _is_plain_greedy(spec: SampleSpec) -> bool:
    params = spec.params
    return (
        params.temperature == 0.0
        and params.logprobs is None
        and not params.logit_bias
        and params.repetition_penalty == 1.0
        and params.presence_penalty == 0.0
        and params.frequency_penalty == 0.0
        and len(spec.output_token_ids) >= params.min_tokens
    )


def _sample_row(raw: npt.NDArray[np.float32], spec: SampleSpec) -> Sampled:
    params = spec.params
    scores = _adjusted(raw, spec)
    token = int(scores.argmax())
    if scores[token] == -np.inf:
        raise InvalidRequest("min_tokens forbids every token of the vocabulary", field="min_tokens")
    if params.temperature > 0.0:
        position = len(spec.prompt_token_ids) + len(spec.output_token_ids)
        token = _draw(scores, params, uniforms(params.seed, position, len(scores)))
    if params.logprobs is None:
        return Sampled(token, None, [])
    logprobs = _log_softmax(raw)
    likeliest = _largest(logprobs, params.logprobs)
    likeliest = likeliest[np.argsort(-logprobs[likeliest], kind="stable")]
    top = [(int(other), float(logprobs[other])) for other in likeliest]
    return Sampled(token, float(logprobs[token]), top)


def _log_softmax(raw: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shifted = raw - raw.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), dtype=np.float32)


def _adjusted(raw: npt.NDArray[np.float32], spec: SampleSpec) -> _Floats:
    """A copy of the row with bias, penalties and forbidden tokens."""
    params = spec.params
    scores = raw.astype(np.float64)
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array([*spec.prompt_token_ids, *spec.output_token_ids], dtype=np.int64))
        held, penalty = scores[seen], params.repetition_penalty
        with np.errstate(over="ignore"):  # a penalty near 0 may not push a score out of the numbers
            held = np.clip(np.where(held > 0.0, held / penalty, held * penalty), -_HUGE, _HUGE)
        scores[seen] = held
    if params.presence_penalty or params.frequency_penalty:
        said, counts = np.unique(np.array(spec.output_token_ids, dtype=np.int64), return_counts=True)
        scores[said] -= params.presence_penalty + params.frequency_penalty * counts
    if len(spec.output_token_ids) < params.min_tokens:
        ends = [token for token in (*spec.eos_token_ids, *params.stop_token_ids) if token < len(scores)]
        scores[np.array(ends, dtype=np.int64)] = -np.inf
    return scores


def _draw(scores: _Floats, params: SamplingParams, numbers: _Floats) -> int:
    """The kept token whose scaled score plus Gumbel noise is highest; of equals the lowest."""
    with np.errstate(over="ignore"):  # a far token's score is rightly minus infinity
        scaled = (scores - scores.max()) / params.temperature
    # Logarithms are slow: only for those that could beat the likeliest token with the best noise of all.
    bar = _gumbel(numbers[scaled.argmax()]) - _gumbel(numbers.max())
    if params.top_k or params.top_p < 1.0 or params.min_p > 0.0:
        with np.errstate(under="ignore"):
            weights = np.exp(scaled)
        kept = _largest(weights, _num_kept(weights, params))
        kept = kept[
            (weights[kept] >= params.min_p) & (scaled[kept] >= bar)
        ]  # the likeliest one's weight is 1
    else:
        kept = np.flatnonzero(scaled >= bar)
    return int(kept[(scaled[kept] + _gumbel(numbers[kept])).argmax()])


def _gumbel(numbers: npt.NDArray[np.float64] | np.float64) -> npt.NDArray[np.float64]:
    return np.asarray(-np.log(-np.log(numbers)))


def _num_kept(weights: _Floats, params: SamplingParams) -> int:
    """How many of the likeliest tokens top_k leaves, and of these top_p: at least one."""
    count = min(params.top_k or len(weights), len(weights))
    if params.top_p == 1.0:
        return count
    reached = np.cumsum(np.sort(weights)[::-1][:count])
    return min(int(np.searchsorted(reached, params.top_p * reached[-1], side="left")) + 1, count)


def _largest(values: npt.NDArray[np.floating], count: int) -> _Ids:
    """Indices, ascending, of the ``count`` largest values; among equals the lower indices."""
    if count >= len(values):
        return np.arange(len(values))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    least = np.partition(values, len(values) - count)[len(values) - count]
    above = values > least
    ties = np.flatnonzero(values == least)[: count - int(np.count_nonzero(above))]
    above[ties] = True
    return np.flatnonzero(above)
