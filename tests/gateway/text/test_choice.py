"""One choice: the answer is the same however its tokens were merged on their way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from microserve.gateway.routers.mailbox import TokenBatch
from microserve.gateway.text.choice import LOWEST_LOGPROB, Choice, Timeline, TokenText
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.errors import CacheFull, MeshError, PeerError, ProtocolViolation
from microserve.protocol.messages.engine import TokenLogprob, Usage
from microserve.protocol.messages.router import Ended, Phases
from microserve.protocol.messages.sampling import SamplingParams

ENDED = Ended("length", Usage(), Phases(), "auto", [])


def choice(tokenizer: ModelTokenizer, stop: list[str], **sampling: Any) -> Choice:
    params = SamplingParams(max_tokens=100, **sampling)
    return Choice(tokenizer, index=0, prompt_ids=[], sampling=params, stop=stop, times=Timeline(0.0))


def answer(
    tokenizer: ModelTokenizer, ids: list[int], cuts: list[int], stop: list[str], **sampling: Any
) -> tuple[str, list[TokenText], str | None, int]:
    chosen = choice(tokenizer, stop, **sampling)
    text, tokens = "", []
    borders = sorted({min(cut, len(ids)) for cut in cuts} | {0, len(ids)})
    for begin, end in zip(borders, [*borders[1:], len(ids)], strict=True):
        batch = TokenBatch(ids[begin:end], ended=ENDED if end == len(ids) else None)
        if "logprobs" in sampling:
            batch.logprobs = [TokenLogprob(-0.5 * i, [(i, -1.0)]) for i in batch.token_ids]
        piece = chosen.push(batch)
        text += piece.text
        tokens += piece.tokens
    assert chosen.over and chosen.error is None
    return text, tokens, chosen.finish_reason, chosen.num_output_tokens


@given(
    text=st.text(st.sampled_from("ab 😀é"), max_size=20),
    stop=st.lists(st.text(st.sampled_from("ab 😀"), min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(0, 60)),
    min_tokens=st.integers(0, 6),
    logprobs=st.sampled_from([None, 0, 1]),
)
def test_merging_changes_nothing(
    tokenizer: ModelTokenizer,
    raw_tokenizer: Tokenizer,
    text: str,
    stop: list[str],
    cuts: list[int],
    min_tokens: int,
    logprobs: int | None,
) -> None:
    ids = raw_tokenizer.encode(text).ids
    sampling = {"min_tokens": min_tokens} | ({} if logprobs is None else {"logprobs": logprobs})
    one_by_one = answer(tokenizer, ids, list(range(len(ids))), stop, **sampling)
    assert answer(tokenizer, ids, cuts, stop, **sampling) == one_by_one
    assert text.startswith(one_by_one[0])
    if not stop:
        assert one_by_one[0] == text


def test_stop_strings_count_behind_the_least_length(
    tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer
) -> None:
    [b] = raw_tokenizer.encode("b").ids
    for min_tokens, shown in ((0, ""), (1, "b"), (3, "bbb")):
        text, _, reason, num_tokens = answer(tokenizer, [b] * 9, [], ["b"], min_tokens=min_tokens)
        assert (text, reason, num_tokens) == (shown, "stop", min_tokens + 1)


def test_the_stop_token_is_counted_but_not_shown(tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer) -> None:
    [a], [b] = raw_tokenizer.encode("a").ids, raw_tokenizer.encode("b").ids
    chosen = choice(tokenizer, [], logprobs=0)
    ended = Ended("stop", Usage(), Phases(), "auto", [], stop_token_id=b)
    piece = chosen.push(TokenBatch([a, b], [TokenLogprob(-1.0), TokenLogprob(-2.0)], ended))
    assert (piece.text, piece.finish_reason, chosen.num_output_tokens) == ("a", "stop", 2)
    assert [token.text for token in piece.tokens] == ["a"]


def test_a_stop_string_that_only_the_end_completes(
    tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer
) -> None:
    """Half a character is flushed at the end as a replacement character, and may be what was waited for."""
    ids = raw_tokenizer.encode("x😀").ids[:-1]
    chosen = choice(tokenizer, ["\N{REPLACEMENT CHARACTER}"])
    piece = chosen.push(TokenBatch(ids, ended=ENDED))
    assert (piece.text, piece.finish_reason) == ("x", "stop")


@pytest.mark.parametrize(
    ("reason", "code", "kind"),
    [
        ("error", "cache_full", CacheFull),
        ("error", "of_a_newer_router", MeshError),
        ("abort", "", PeerError),
        ("mystery", "", ProtocolViolation),
    ],
)
def test_other_ends_are_errors(
    tokenizer: ModelTokenizer, reason: str, code: str, kind: type[MeshError]
) -> None:
    chosen = choice(tokenizer, [])
    chosen.push(TokenBatch([], ended=Ended(reason, Usage(), Phases(), "auto", [], code, "why")))
    assert isinstance(chosen.error, kind)
    assert chosen.finish_reason is None


def test_logprobs_that_json_cannot_say(tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer) -> None:
    ids = raw_tokenizer.encode("ab").ids
    chosen = choice(tokenizer, [], logprobs=1)
    logprobs = [TokenLogprob(float("-inf"), [(0, float("nan"))])] + [TokenLogprob(0.0)] * (len(ids) - 1)
    piece = chosen.push(TokenBatch(ids, logprobs))
    assert piece.tokens[0].logprob == LOWEST_LOGPROB
    assert piece.tokens[0].top[0].logprob == LOWEST_LOGPROB
