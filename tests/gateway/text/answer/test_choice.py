"""One choice: the answer is the same however its tokens were merged on their way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from microserve.gateway.routers.mailbox import TokenBatch
from microserve.gateway.text.answer.choice import Choice, Piece, Timeline
from microserve.gateway.text.answer.transcript import LOWEST_LOGPROB, TokenText
from microserve.gateway.text.options import SHOWN_BY_DEFAULT, TextOptions
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.errors import CacheFull, MeshError, PeerError, ProtocolViolation
from microserve.protocol.messages.engine import TokenLogprob, Usage
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.router import Ended, Phases
from tests.support.gateway.gateway_world import special_id
from tests.support.gateway.tokenizers import KINDS, byte_ids, ids_of

ENDED = Ended("length", Usage(), Phases(), "auto", [])


def choice(
    tokenizer: ModelTokenizer,
    stop: list[str],
    prompt: Sequence[int] = (),
    eos: Sequence[int] = (),
    text: TextOptions = SHOWN_BY_DEFAULT,
    **sampling: Any,
) -> Choice:
    params = SamplingParams(max_tokens=100, **sampling)
    times = Timeline(0.0)
    return Choice(
        tokenizer,
        index=0,
        prompt_ids=prompt,
        sampling=params,
        stop=stop,
        times=times,
        text=text,
        eos_token_ids=lambda: eos,
    )


def answer(
    tokenizer: ModelTokenizer,
    ids: list[int],
    cuts: list[int],
    stop: list[str],
    prompt: Sequence[int] = (),
    **sampling: Any,
) -> tuple[str, list[TokenText], str | None, int]:
    chosen = choice(tokenizer, stop, prompt, **sampling)
    text, tokens = "", []
    borders = sorted({min(cut, len(ids)) for cut in cuts} | {0, len(ids)})
    for begin, end in zip(borders, [*borders[1:], len(ids)], strict=True):
        batch = TokenBatch(ids[begin:end], ended=ENDED if end == len(ids) else None)
        if sampling.get("logprobs") is not None:
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
    one_by_one = answer(tokenizer, ids, list(range(len(ids))), stop, min_tokens=min_tokens, logprobs=logprobs)
    assert answer(tokenizer, ids, cuts, stop, min_tokens=min_tokens, logprobs=logprobs) == one_by_one
    assert text.startswith(one_by_one[0])
    if logprobs is not None:
        assert b"".join(token.data for token in one_by_one[1]).decode() == one_by_one[0]
    if not stop:
        assert one_by_one[0] == text


def test_stop_strings_count_behind_the_least_length(
    tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer
) -> None:
    [b] = raw_tokenizer.encode("b").ids
    for min_tokens, shown in ((0, ""), (1, "b"), (3, "bbb")):
        text, _, reason, num_tokens = answer(tokenizer, [b] * 9, [], ["b"], min_tokens=min_tokens)
        assert (text, reason, num_tokens) == (shown, "stop", min_tokens + 1)


def test_a_stop_string_that_begins_within_the_least_length(
    tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer
) -> None:
    """D3: it counts when it is complete behind them; one that is complete within them does not."""
    ids = raw_tokenizer.encode("xabab").ids
    assert len(ids) == 5
    for min_tokens, shown in ((0, "x"), (2, "x"), (3, "xab"), (4, "xab")):
        text, _, reason, num_tokens = answer(tokenizer, ids, [], ["ab"], min_tokens=min_tokens)
        assert (text, reason) == (shown, "stop")
        assert num_tokens == len(shown) + 2
    assert answer(tokenizer, ids, [], ["ab"], min_tokens=5)[0] == "xabab"


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


# --- logprobs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
@given(
    prompt=st.lists(st.integers(0, 299), max_size=6),
    ids=st.lists(st.integers(0, 299), max_size=12),
    stop=st.lists(st.sampled_from(["the", " ", "a", "o", "漢", "\N{REPLACEMENT CHARACTER}"]), max_size=2),
    min_tokens=st.integers(0, 4),
    cuts=st.lists(st.integers(0, 12)),
)
def test_the_bytes_of_the_tokens_are_the_text(
    kind: str, prompt: list[int], ids: list[int], stop: list[str], min_tokens: int, cuts: list[int]
) -> None:
    """D1, for every kind of tokenizer, random tokens and stop strings that cut a token in two."""
    tokenizer, size = TOKENIZERS[kind], TOKENIZERS[kind].vocab_size
    prompt, ids = [each % size for each in prompt], [each % size for each in ids]
    text, tokens, *_ = answer(tokenizer, ids, cuts, stop, prompt, min_tokens=min_tokens, logprobs=1)
    assert b"".join(token.data for token in tokens).decode("utf-8", "replace") == text
    for token in tokens:
        if token.data and not token.text.startswith("bytes:"):
            assert text[token.offset :].startswith(token.text)
    assert answer(tokenizer, ids, [], stop, prompt, min_tokens=min_tokens)[0] == text


TOKENIZERS = {kind: ModelTokenizer(make()) for kind, make in KINDS.items()}


def test_tokens_of_a_sentencepiece_tokenizer() -> None:
    """D1: `` the mesh`` was "the" and "mesh", and every offset was wrong."""
    raw = KINDS["byte_fallback"]()
    ids = [*ids_of(raw, ["▁the", "▁mesh"]), *byte_ids(raw, "漢"), *ids_of(raw, ["!"])]
    prompt = [*ids_of(raw, ["<s>", "▁he"]), *byte_ids(raw, "😀😀")]
    text, tokens, *_ = answer(TOKENIZERS["byte_fallback"], ids, [], [], prompt, logprobs=1)
    assert text == " the mesh漢!"
    assert [token.text for token in tokens] == [
        *(" the", " mesh", r"bytes:\xe6", r"bytes:\xbc", r"bytes:\xa2", "!")
    ]
    assert [token.offset for token in tokens] == [0, 4, 9, 9, 9, 10]
    assert [token.top[0].text for token in tokens] == [token.text for token in tokens]


def test_a_stop_string_takes_its_tokens_with_it() -> None:
    raw = KINDS["byte_fallback"]()
    ids = ids_of(raw, ["▁the", "▁world", "!"])
    text, tokens, reason, _ = answer(TOKENIZERS["byte_fallback"], ids, [1], ["orld"], logprobs=0)
    assert (text, reason) == ("the w", "stop")
    assert [(token.text, token.data, token.offset) for token in tokens] == [
        ("the", b"the", 0),
        (" w", b" w", 3),
    ]


def test_special_tokens_are_named_and_have_no_bytes() -> None:
    raw = KINDS["byte_level"]()
    ids = ids_of(raw, ["a", "<s>", "b"])
    text, tokens, *_ = answer(TOKENIZERS["byte_level"], ids, [], [], logprobs=0)
    assert (text, [token.text for token in tokens]) == ("ab", ["a", "<s>", "b"])
    assert [(token.data, token.offset) for token in tokens] == [(b"a", 0), (b"", 1), (b"b", 1)]


# --- the token that ends it ------------------------------------------------------------------------


@pytest.mark.parametrize("known_as", ["eos_token_ids", "stop_token_ids"])
@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize("named", [True, False])
def test_a_stop_token_that_comes_before_the_end_is_not_shown(
    tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer, known_as: str, logprobs: int | None, named: bool
) -> None:
    """D4: another engine made it, or the router that said so is lost: the end comes in a later message."""
    [a], [b] = raw_tokenizer.encode("a").ids, raw_tokenizer.encode("b").ids
    if known_as == "eos_token_ids":
        chosen = choice(tokenizer, [], eos=[b], logprobs=logprobs)
    else:
        chosen = choice(tokenizer, [], stop_token_ids=(b,), logprobs=logprobs)
    with_logprobs = [] if logprobs is None else [TokenLogprob(-1.0)]
    pieces = [
        chosen.push(TokenBatch([a], with_logprobs)),
        chosen.push(TokenBatch([b], with_logprobs)),
        chosen.push(
            TokenBatch(ended=Ended("stop", Usage(), Phases(), "auto", [], stop_token_id=b if named else None))
        ),
    ]
    assert [piece.text for piece in pieces] == ["a", "", ""]
    assert [token.text for piece in pieces for token in piece.tokens] == ([] if logprobs is None else ["a"])
    assert (chosen.finish_reason, chosen.num_output_tokens) == ("stop", 2)


@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_stop_token_that_was_not_the_end_is_shown(
    tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer, logprobs: int | None
) -> None:
    [a], [b] = raw_tokenizer.encode("a").ids, raw_tokenizer.encode("b").ids
    chosen = choice(tokenizer, [], stop_token_ids=(b,), logprobs=logprobs)
    with_logprobs = [] if logprobs is None else [TokenLogprob(-1.0)]
    pieces = [chosen.push(TokenBatch([each], with_logprobs)) for each in (b, a, b)]
    pieces.append(chosen.push(TokenBatch(ended=ENDED)))
    assert [piece.text for piece in pieces] == ["", "ba", "", "b"]
    assert "".join(token.text for piece in pieces for token in piece.tokens) == (
        "" if logprobs is None else "bab"
    )


def test_a_token_that_is_to_be_ignored_as_an_end_is_text_at_once(
    tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer
) -> None:
    [b] = raw_tokenizer.encode("b").ids
    assert choice(tokenizer, [], eos=[b], ignore_eos=True).push(TokenBatch([b])).text == "b"


@given(
    ids=st.lists(st.sampled_from([0, 1, 2]), max_size=8),
    cuts=st.lists(st.integers(0, 8)),
    stop=st.lists(st.sampled_from(["b", "ab", "bb"]), max_size=2),
    min_tokens=st.integers(0, 3),
    logprobs=st.sampled_from([None, 0]),
)
def test_merging_changes_nothing_with_stop_tokens(
    tokenizer: ModelTokenizer,
    raw_tokenizer: Tokenizer,
    ids: list[int],
    cuts: list[int],
    stop: list[str],
    min_tokens: int,
    logprobs: int | None,
) -> None:
    letters = [raw_tokenizer.encode(letter).ids[0] for letter in "abc"]
    ids = [letters[each] for each in ids]
    sampling: Any = {"stop_token_ids": (letters[1],), "min_tokens": min_tokens, "logprobs": logprobs}
    one_by_one = answer(tokenizer, ids, list(range(len(ids))), stop, **sampling)
    assert answer(tokenizer, ids, cuts, stop, **sampling) == one_by_one


@given(
    text=st.text(st.sampled_from("ab 😀é"), max_size=20),
    stop=st.lists(st.text(st.sampled_from("ab 😀"), min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(0, 60)),
    logprobs=st.sampled_from([None, 0]),
)
def test_an_included_stop_string_is_the_end_of_the_answer(
    tokenizer: ModelTokenizer,
    raw_tokenizer: Tokenizer,
    text: str,
    stop: list[str],
    cuts: list[int],
    logprobs: int | None,
) -> None:
    ids = raw_tokenizer.encode(text).ids
    without, _, reason, _ = answer(tokenizer, ids, cuts, stop, logprobs=logprobs)
    shown, tokens, again, _ = answer(
        tokenizer, ids, cuts, stop, logprobs=logprobs, text=TextOptions(include_stop=True)
    )
    assert again == reason and text.startswith(shown)
    if reason == "length":
        assert shown == without
    else:
        assert shown.removeprefix(without) in stop
    if logprobs is not None:
        assert b"".join(token.data for token in tokens).decode() == shown


@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (TextOptions(), "aa"),
        (TextOptions(skip_special_tokens=False), "<|im_start|>aa"),
        (TextOptions(include_stop=True), "aa"),
        (TextOptions(skip_special_tokens=False, include_stop=True), "<|im_start|>aa<|im_end|>"),
    ],
)
def test_special_tokens_are_shown_on_request_and_the_last_one_with_the_stop(
    tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer, text: TextOptions, shown: str, logprobs: int | None
) -> None:
    [a] = raw_tokenizer.encode("a").ids
    start, end = (special_id(raw_tokenizer, token) for token in ("<|im_start|>", "<|im_end|>"))
    chosen = choice(tokenizer, [], text=text, eos=[end], logprobs=logprobs)
    whole = ""
    for ids in ([start, a], [a], [end]):  # the word that it was the end comes behind the token
        piece = chosen.push(TokenBatch(ids, [TokenLogprob(-1.0)] * len(ids)))
        whole += piece.text
    piece = chosen.push(TokenBatch([], ended=Ended("stop", Usage(), Phases(), "auto", [], stop_token_id=end)))
    assert whole + piece.text == shown
    assert (piece.finish_reason, chosen.num_output_tokens) == ("stop", 4)


@pytest.mark.parametrize(("include", "shown"), [(False, "a"), (True, "ab")])
def test_a_stop_token_with_a_text_is_shown_only_with_the_stop(
    tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer, include: bool, shown: str
) -> None:
    [a], [b] = raw_tokenizer.encode("a").ids, raw_tokenizer.encode("b").ids
    chosen = choice(tokenizer, [], text=TextOptions(include_stop=include), stop_token_ids=(b,))
    ended = Ended("stop", Usage(), Phases(), "auto", [], stop_token_id=b)
    assert chosen.push(TokenBatch([a, b], ended=ended)).text == shown
    late = choice(tokenizer, [], text=TextOptions(include_stop=include), stop_token_ids=(b,))
    piece = late.push(TokenBatch([a, b]))
    last = Piece()
    late.cut_short(last)  # its time is over before the word comes
    assert (piece.text + last.text, last.finish_reason) == (shown, "stop")
