"""Less than was asked for: what a strategy may take from a request's sampling, and nothing else of it.

Sans-I/O. A cap ends an answer earlier or tells less of it; which tokens it has depends on neither.
"""

from __future__ import annotations

import msgspec

from microserve.protocol.errors import MeshError, StrategyError
from microserve.protocol.messages.request.sampling import SamplingParams


class AnswerWhole(MeshError):
    """All that may come of the answer was delivered elsewhere: its end is all that is left. Not sent."""


def capped(sampling: SamplingParams, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """With at most ``max_tokens`` of output and ``logprobs`` alternatives a token; None: as it is. The same
    object where that is no less than what was asked for. Raises :class:`StrategyError` outside the bounds."""
    _check("max_tokens", max_tokens, 1)
    _check("logprobs", logprobs, 0)
    if max_tokens is not None and max_tokens < sampling.max_tokens:
        # Below min_tokens no end can be chosen: with as many as come at all, that is as before.
        least = min(sampling.min_tokens, max_tokens)
        sampling = msgspec.structs.replace(sampling, max_tokens=max_tokens, min_tokens=least)
    if logprobs is not None and sampling.logprobs is not None and logprobs < sampling.logprobs:
        sampling = msgspec.structs.replace(sampling, logprobs=logprobs)
    return sampling


def _check(name: str, value: int | None, least: int) -> None:
    if value is not None and (type(value) is not int or value < least):
        raise StrategyError(f"cap: {name} is {value!r}, not a whole number from {least}")
