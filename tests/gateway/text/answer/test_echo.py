"""A choice that begins with its prompt: all of it, once, and its tokens beside their text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.gateway.routers.mailbox import TokenBatch
from microserve.gateway.text.answer import echo as echo_module
from microserve.gateway.text.answer.choice import Choice, Timeline
from microserve.gateway.text.answer.scored import ScoredPrompt
from microserve.gateway.text.answer.transcript import TokenText
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.messages.engine import TokenLogprob, Usage
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprob, PromptLogprobs, packed
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.router import Ended, Phases
from tests.support.gateway.gateway_world import special_id
from tests.support.gateway.tokenizers import KINDS

ENDED = Ended("length", Usage(), Phases(), "auto", [])
END = "</s>"


def make_tokenizer(kind: str = "byte_level") -> ModelTokenizer:
    return ModelTokenizer(KINDS[kind]())


def ids_of(tokenizer: ModelTokenizer, text: str) -> list[int]:
    return list(tokenizer._tokenizer.encode(text, add_special_tokens=False).ids)


def rows_of(prompt: list[int], begin: int, end: int) -> PromptLogprobs:
    """Each token is second to a neighbour."""
    each = range(begin, end)
    return packed(begin, 1, [PromptLogprob(-float(at), 2, ((prompt[at] ^ 1, -0.5),)) for at in each])


def make(
    tokenizer: ModelTokenizer, prompt: list[int], *, logprobs: int | None, stop: tuple[str, ...] = ()
) -> Choice:
    return Choice(
        tokenizer,
        index=0,
        prompt_ids=prompt,
        sampling=SamplingParams(max_tokens=100, logprobs=logprobs),
        stop=stop,
        times=Timeline(0.0),
        echo=True,
        scored=None if logprobs is None else ScoredPrompt(prompt, tokenizer.vocabulary),
        eos_token_ids=lambda: [special_id(tokenizer._tokenizer, END)],
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
@given(
    ids=st.tuples(
        st.lists(st.integers(0, 999), min_size=1, max_size=12), st.lists(st.integers(0, 999), max_size=5)
    ),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    at_once=st.integers(1, 5),
)
def test_text_and_tokens_are_those_of_prompt_and_output_together(
    kind: str, ids: tuple[list[int], list[int]], cuts: list[int], at_once: int
) -> None:
    tokenizer = make_tokenizer(kind)
    prompt, output = ([at % tokenizer.vocab_size for at in each] for each in ids)
    choice = make(tokenizer, prompt, logprobs=1)
    assert choice.scored is not None
    text, tokens = "", list[TokenText]()
    borders = sorted({1, len(prompt), *(cut for cut in cuts if 1 <= cut <= len(prompt))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(echo_module, "MAX_TOKENS_AT_ONCE", at_once)
        for begin, end in itertools.pairwise(borders):
            choice.scored.add(rows_of(prompt, begin, end))
            while choice.has_prompt:
                piece = choice.push(TokenBatch())
                text, tokens = text + piece.text, tokens + piece.tokens
                assert len(piece.tokens) <= at_once + 4, "with those that waited for a character's end"
        while choice.has_prompt:  # of one token
            piece = choice.push(TokenBatch())
            text, tokens = text + piece.text, tokens + piece.tokens
    assert not choice.lacks_prompt and choice.num_output_tokens == 0
    batch = TokenBatch(output, [TokenLogprob(-0.25, [(token, -0.25)]) for token in output], ENDED)
    piece = choice.push(batch)
    text, tokens = text + piece.text, tokens + piece.tokens

    whole = make(tokenizer, [*prompt, *output], logprobs=None).push(TokenBatch([], [], ENDED)).text
    assert text == whole and choice.finish_reason == "length"
    assert [token.token_id for token in tokens] == [*prompt, *output]
    assert b"".join(token.data for token in tokens).decode(errors="replace") == text
    known = [None, *(-float(at) for at in range(1, len(prompt)))]
    assert [token.logprob for token in tokens] == known + [-0.25] * len(output)
    assert [[other.token_id for other in token.top] for token in tokens[1 : len(prompt)]] == [
        [token ^ 1] for token in prompt[1:]
    ]
    assert [token.offset for token in tokens] == sorted(token.offset for token in tokens)


def test_the_text_alone_waits_for_nothing() -> None:
    tokenizer = make_tokenizer()
    choice = make(tokenizer, ids_of(tokenizer, "Hello"), logprobs=None)
    assert choice.awaits_prompt and not choice.lacks_prompt and not choice.is_plain
    piece = choice.push(TokenBatch(ids_of(tokenizer, " you"), [], ENDED))
    assert (piece.text, piece.finish_reason, piece.tokens) == ("Hello you", "length", [])


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_the_token_that_ends_it_is_told_of_and_not_shown(reason: str) -> None:
    """As many entries as tokens: who asks for one counts on one."""
    tokenizer = make_tokenizer()
    end = special_id(tokenizer._tokenizer, END)
    prompt = ids_of(tokenizer, "Hello")
    choice = make(tokenizer, prompt, logprobs=1)
    assert choice.scored is not None
    choice.scored.add(rows_of(prompt, 1, len(prompt)))
    choice.push(TokenBatch())
    ended = Ended(reason, Usage(), Phases(), "auto", [], stop_token_id=end if reason == "stop" else None)
    piece = choice.push(TokenBatch([end], [TokenLogprob(-0.5, [(end, -0.5)])], ended))

    [told] = piece.tokens
    assert (told.text, told.data, told.logprob, told.offset) == (END, b"", -0.5, 5)
    assert (piece.text, piece.finish_reason) == ("", reason)


def test_a_stop_string_counts_in_the_output_alone() -> None:
    tokenizer = make_tokenizer()
    prompt = ids_of(tokenizer, "one stop two")
    choice = make(tokenizer, prompt, logprobs=None, stop=("stop", "two three"))
    piece = choice.push(TokenBatch(ids_of(tokenizer, " three stop x"), [], ENDED))

    assert (piece.text, piece.finish_reason) == ("one stop two three ", "stop")


def test_what_vllm_tells_of_a_prompt() -> None:
    tokenizer = make_tokenizer()
    prompt = ids_of(tokenizer, "Hello")
    scored = ScoredPrompt(prompt, tokenizer.vocabulary)
    scored.add(rows_of(prompt, 1, 2))
    scored.add(rows_of(prompt, 2, len(prompt)))
    first, *rest = scored.ranked(1)

    assert first is None and scored.is_whole
    for at, ranked in enumerate(rest, start=1):
        assert ranked is not None
        assert [(each.token_id, each.logprob, each.rank) for each in ranked] == [
            (prompt[at], -float(at), 2),
            (prompt[at] ^ 1, -0.5, 1),
        ]
        assert ranked[0].text == tokenizer.decode([prompt[at]])
