"""Logits to tokens on the device that has the logits: what sampler.py does row by row, for all rows at once.

    logits [N, vocab_size] ── adjust ── filter ── add noise ──> tokens, log-probabilities ── one copy ──> host

The same order of parameters, the same noise (kernels/philox.py) and the same rule for equals, so a sequence
that moves between engines on different devices goes on with the same tokens. Sums and logarithms of two
devices differ by rounding, which matters only where the best two scores are as close as that. The host
uploads what the device has to know (biases, tokens that were said), and waits for it once, for the result.

Owns that path. Must not know models or sequences' states; what the parameters mean is sampler.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microserve.kernels.philox import uniform_rows
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Sampled, SampleSpec
from microserve.services.engine.model.attention.step import upload
from microserve.services.engine.model.sampler import (
    HUGE,
    failure,
    forbidden_tokens,
    is_plain_greedy,
    said_tokens,
    seen_tokens,
)

MAX_ROWS = 32
"""Rows that are worked on together: a dozen temporaries of 8 bytes for each of their values."""
UNIT = 1 << 43
"""Sums are of whole numbers of its inverse, which a device may add in any order, and does by the number of
rows: so a row's tokens and log-probabilities do not depend on the others. 2**19 values of 1 fit 63 bits."""
_BEST, _TOKEN, _PEAK, _OWN, _TOP = 0, 1, 2, 3, 4
"""Columns of what comes to the host: the highest logit, the token, the highest score that it was drawn from,
its log-probability, then ids and log-probabilities of the likeliest."""


def sample_there(logits: Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
    """As ``sampler.sample``, its errors too, with one wait for the device of ``logits``."""
    if not specs:
        return []
    raw = logits.float()
    num_top = min(max(spec.params.logprobs or 0 for spec in specs), raw.shape[1])
    found = torch.zeros(len(specs), _TOP + 2 * num_top, dtype=torch.float64, device=raw.device)
    best, tokens = raw.max(dim=1)  # the first of equals; the first NaN
    found[:, _BEST] = found[:, _PEAK] = best.double()
    for there, chosen in _groups(specs, raw.device, _is_adjusted):
        tokens[there], found[there, _PEAK] = _choose(raw[there], chosen)
    found[:, _TOKEN] = tokens.double()
    for there, _ in _groups(specs, raw.device, lambda spec: spec.params.logprobs is not None):
        found[there, _OWN:], _ = logprobs_of(raw[there], tokens[there], num_top)
    return _sampled(found.cpu().numpy(), specs, num_top)


def _is_adjusted(spec: SampleSpec) -> bool:
    return spec.allowed is not None or not is_plain_greedy(spec)


def _groups(
    specs: Sequence[SampleSpec], device: torch.device, belongs: Callable[[SampleSpec], bool]
) -> Iterator[tuple[Tensor, list[SampleSpec]]]:
    """(indices [M] of rows that belong, their specs), ``MAX_ROWS`` at a time."""
    rows = [row for row, spec in enumerate(specs) if belongs(spec)]
    for start in range(0, len(rows), MAX_ROWS):
        part = rows[start : start + MAX_ROWS]
        yield _there(part, device), [specs[row] for row in part]


def _choose(raw: Tensor, specs: list[SampleSpec]) -> tuple[Tensor, Tensor]:
    """Tokens [M], and the highest of each row's adjusted scores [M]."""
    scores = raw.double()
    _adjust(scores, specs)
    peak, tokens = scores.max(dim=1)
    hot = [row for row, spec in enumerate(specs) if spec.params.temperature > 0.0]
    if hot:
        there, params = _there(hot, raw.device), [specs[row].params for row in hot]
        scaled = (scores[there] - peak[there, None]) / _column(
            [one.temperature for one in params], raw.device
        )
        kept = _kept(scaled, params)
        positions = [len(specs[row].prompt_token_ids) + len(specs[row].output_token_ids) for row in hot]
        numbers = uniform_rows(
            _there([one.seed for one in params], raw.device), _there(positions, raw.device), raw.shape[1]
        )
        noisy = scaled - (-numbers.log()).log()
        tokens[there] = noisy.masked_fill_(~kept, -torch.inf).argmax(dim=1)
    return tokens, peak


def _adjust(scores: Tensor, specs: list[SampleSpec]) -> None:
    """Bias, penalties and forbidden tokens, in place."""
    entries = _Entries(scores)
    for row, spec in enumerate(specs):
        entries.add(row, list(spec.params.logit_bias), list(spec.params.logit_bias.values()))
    if entries:
        entries.put(entries.held + entries.values)
    entries = _Entries(scores)
    for row, spec in enumerate(specs):
        if (penalty := spec.params.repetition_penalty) != 1.0:
            seen = seen_tokens(spec)
            entries.add(row, seen, np.full(len(seen), penalty))
    if entries:
        held, penalties = entries.held, entries.values
        entries.put(torch.where(held > 0.0, held / penalties, held * penalties).clamp_(-HUGE, HUGE))
    entries = _Entries(scores)
    for row, spec in enumerate(specs):
        entries.add(row, *said_tokens(spec))
    if entries:
        entries.put(entries.held - entries.values)
    _mask(scores, specs)
    entries = _Entries(scores)
    for row, spec in enumerate(specs):
        ends = forbidden_tokens(spec, scores.shape[1])
        entries.add(row, ends, np.full(len(ends), -np.inf))
    if entries:
        entries.put(entries.values)


def _mask(scores: Tensor, specs: list[SampleSpec]) -> None:
    """Forbid, in place, what grammars do not allow: 32 tokens a word go up, and are taken apart there."""
    rows = [row for row, spec in enumerate(specs) if spec.allowed is not None]
    if not rows:
        return
    words = np.stack([mask.view(np.int32) for spec in specs if (mask := spec.allowed) is not None])
    there = upload(words.astype(np.int64), scores.device)
    bits = there[:, :, None] >> torch.arange(32, device=scores.device) & 1
    is_allowed = bits.flatten(1)[:, : scores.shape[1]].bool()
    place = _there(rows, scores.device)
    scores[place] = scores[place].masked_fill(~is_allowed, -torch.inf)


class _Entries:
    """Single scores of several rows, and a number for each. No score occurs twice."""

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores
        self._rows: list[npt.NDArray[np.int64]] = []
        self._tokens: list[npt.NDArray[np.int64]] = []
        self._values: list[npt.NDArray[np.float64]] = []
        self._place: tuple[Tensor, Tensor] | None = None

    def add(self, row: int, tokens: npt.ArrayLike, values: npt.ArrayLike) -> None:
        tokens = np.asarray(tokens, dtype=np.int64)
        if len(tokens):
            self._rows.append(np.full(len(tokens), row))
            self._tokens.append(tokens)
            self._values.append(np.asarray(values, dtype=np.float64))

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def place(self) -> tuple[Tensor, Tensor]:
        if self._place is None:
            both = upload(np.stack([np.concatenate(self._rows), np.concatenate(self._tokens)]), self._device)
            self._place = (both[0], both[1])
        return self._place

    @property
    def held(self) -> Tensor:
        return self._scores[self.place]

    @property
    def values(self) -> Tensor:
        return upload(np.concatenate(self._values), self._device)

    def put(self, values: Tensor) -> None:
        self._scores[self.place] = values

    @property
    def _device(self) -> torch.device:
        return self._scores.device


def _kept(scaled: Tensor, params: list[SamplingParams]) -> Tensor:
    """[M, vocab_size] bool: the tokens that top_k, of these top_p, and min_p leave."""
    device, vocab_size = scaled.device, scaled.shape[1]
    weights = scaled.exp()
    kept = weights >= _column([one.min_p for one in params], device)
    limited = [row for row, one in enumerate(params) if one.top_k or one.top_p < 1.0]
    if limited:
        there = _there(limited, device)
        # Among equals the lower ids come first; equal weights may be of scores that are not.
        order = scaled[there].sort(dim=1, descending=True, stable=True).indices
        ordered = weights[there].gather(1, order)
        most = [min(params[row].top_k or vocab_size, vocab_size) for row in limited]
        count = _column(most, device)
        ranks = torch.arange(vocab_size, device=device)
        reached = torch.where(ranks < count, _in_units(ordered), 0).cumsum(dim=1).double()
        share = _column([params[row].top_p for row in limited], device)
        # The first that reaches the share is the last that is kept; a share of 1 keeps all.
        needed = torch.where(share < 1.0, share * reached[:, -1:], torch.inf)
        last = (reached < needed).sum(dim=1, keepdim=True)
        is_within = (ranks < count) & (ranks <= last)
        kept[there] &= torch.zeros_like(is_within).scatter_(1, order, is_within)
    return kept


def _in_units(weights: Tensor) -> Tensor:
    """Numbers in [0, 1] as int64."""
    return (weights.double() * UNIT).round().long()


def logprobs_of(raw: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """[M, 1 + 2 * num_top] float64: the tokens' own, ids of the likeliest, theirs; of the raw logits. And the
    tokens' ranks [M], of which 1 is the likeliest's."""
    shifted = raw - raw.max(dim=1, keepdim=True).values
    total = _in_units(shifted.exp()).sum(dim=1, keepdim=True).double() / UNIT
    logprobs = shifted - total.log().float()
    own = logprobs.gather(1, tokens[:, None])
    parts = [own.double()]
    if num_top:
        values, ids = logprobs.sort(dim=1, descending=True, stable=True)
        parts += [ids[:, :num_top].double(), values[:, :num_top].double()]
    return torch.cat(parts, dim=1), 1 + (logprobs > own).sum(dim=1)


def _sampled(found: npt.NDArray[np.float64], specs: Sequence[SampleSpec], num_top: int) -> list[Sampled]:
    result: list[Sampled] = []
    for row, spec in zip(found, specs, strict=True):
        failed = failure(float(row[_BEST]), float(row[_PEAK]))
        if failed is not None:
            result.append(failed)
            continue
        asked, token = spec.params.logprobs, int(row[_TOKEN])
        if asked is None:
            result.append(Sampled(token, None, []))
            continue
        asked = min(asked, num_top)
        ids, values = row[_TOP : _TOP + asked], row[_TOP + num_top : _TOP + num_top + asked]
        top = [(int(other), float(value)) for other, value in zip(ids, values, strict=True)]
        result.append(Sampled(token, float(row[_OWN]), top))
    return result


def _there(numbers: Sequence[int], device: torch.device) -> Tensor:
    return upload(np.asarray(numbers, dtype=np.int64), device)


def _column(numbers: Sequence[float], device: torch.device) -> Tensor:
    return upload(np.asarray(numbers)[:, None], device)
