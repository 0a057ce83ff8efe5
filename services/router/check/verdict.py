"""Are two answers to one question equal? Pure.

Engines of an exact class promise the same bits whatever the company, so tokens and log-probabilities are held
against each other bit for bit. Others promise no bits: their greedy tokens are compared, up to where two
tokens are so nearly as likely that rounding may choose.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from microserve.protocol.messages.check import BITS
from microserve.protocol.messages.engine import TokenLogprob

TIE = 0.5
"""In nats: log-probabilities of two tokens that lie no further apart may change places by rounding
(bfloat16)."""

_encode = msgspec.msgpack.encode


class Answer(NamedTuple):
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    """One for each token, with the likeliest others."""
    num_computed: int = 0
    """Tokens of prompt and output that were computed for it."""


def first_difference(one: Answer, other: Answer, compared: str) -> int | None:
    """Position of the first token in which they differ; None: they are equal. ``compared``: ``bits``, or else
    tokens."""
    if compared == BITS:
        return _first_other_bit(one, other)
    for position, (mine, theirs) in enumerate(zip(one.token_ids, other.token_ids, strict=False)):
        if mine != theirs:
            is_tie = any(
                _is_tie(answer.logprobs[position : position + 1], mine, theirs) for answer in (one, other)
            )
            return None if is_tie else position
    shorter, longer = sorted((len(one.token_ids), len(other.token_ids)))
    return None if shorter == longer else shorter


def _first_other_bit(one: Answer, other: Answer) -> int | None:
    for position in range(max(len(one.token_ids), len(other.token_ids))):
        mine, theirs = (
            _encode((each.token_ids[position : position + 1], each.logprobs[position : position + 1]))
            for each in (one, other)
        )
        if mine != theirs:
            return position
    return None


def _is_tie(told: list[TokenLogprob], mine: int, theirs: int) -> bool:
    likely = dict(told[0].top) if told else {}
    return mine in likely and theirs in likely and abs(likely[mine] - likely[theirs]) <= TIE
