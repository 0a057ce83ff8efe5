"""Text that grows: whole characters only, and in the end exactly what decoding everything at once gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from microserve.gateway.text.detokenizer import MAX_HELD_TOKENS, REPLACEMENT, Detokenizer
from microserve.gateway.text.tokenizer import ModelTokenizer
from tests.support.gateway.gateway_world import special_id

TEXT = st.text(alphabet=st.sampled_from("abc Hello,😀👩‍🚀漢字éÅ\n\t\U0001f1e9\U0001f1ea"), max_size=40)


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text as one token a byte: every border between bytes is a border between tokens."""
    alphabet = ModelTokenizer(tokenizer)
    by_byte = {
        alphabet.token_bytes(i): i
        for i in range(tokenizer.get_vocab_size())
        if len(alphabet.token_bytes(i)) == 1
    }
    alphabet.close()
    return [by_byte[bytes([byte])] for byte in text.encode()]


def grow(tokenizer: Tokenizer, prompt: list[int], ids: list[int], cuts: list[int]) -> list[str]:
    """Pieces for the ids handed over in chunks of the sizes ``cuts``, then one by one, then the flush."""
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces: list[str] = []
    position = 0
    for size in [*cuts, *[1] * len(ids)]:
        pieces.append(detokenizer.push(ids[position : position + size]))
        position += size
    return [*pieces, detokenizer.flush()]


@given(prompt=TEXT, text=TEXT, cuts=st.lists(st.integers(0, 7), max_size=8))
def test_pieces_join_to_the_whole_text(
    raw_tokenizer: Tokenizer, prompt: str, text: str, cuts: list[int]
) -> None:
    pieces = grow(raw_tokenizer, raw_tokenizer.encode(prompt).ids, raw_tokenizer.encode(text).ids, cuts)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@given(text=TEXT, cuts=st.lists(st.integers(0, 7), max_size=8))
def test_no_character_is_ever_split(raw_tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    pieces = grow(raw_tokenizer, [], byte_ids(raw_tokenizer, text), cuts)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 380), max_size=40), cuts=st.lists(st.integers(0, 7), max_size=8))
def test_any_ids_give_what_decoding_them_at_once_gives(
    raw_tokenizer: Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    """Random bytes too; within MAX_HELD_TOKENS even those that never become a character."""
    assert "".join(grow(raw_tokenizer, [], ids, cuts)) == raw_tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_flushed_as_a_replacement(raw_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(raw_tokenizer, [])
    assert detokenizer.push(byte_ids(raw_tokenizer, "a😀")[:-1]) == "a"
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


def test_special_tokens_have_no_text(raw_tokenizer: Tokenizer) -> None:
    end = special_id(raw_tokenizer, "<|im_end|>")
    ids = [end, *raw_tokenizer.encode("a").ids, end, *raw_tokenizer.encode("b").ids, end]
    assert "".join(grow(raw_tokenizer, [end], ids, [])) == "ab"


def test_a_prompt_that_ends_in_half_a_character_does_not_come_out_again(raw_tokenizer: Tokenizer) -> None:
    ids = byte_ids(raw_tokenizer, "prompt😀x")
    pieces = grow(raw_tokenizer, ids[:8], ids[8:], [])
    assert "".join(pieces) == raw_tokenizer.decode(ids[8:])
    assert "prompt" not in "".join(pieces)


def test_a_word_decoded_after_the_prompt_keeps_its_space() -> None:
    """Decoders of the sentencepiece kind drop a space at the start of what they are given."""
    vocabulary = {"▁Hello": 0, "▁world": 1, "<0xF0>": 2, "<0x9F>": 3, "<0x98>": 4, "<0x80>": 5, "!": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert "".join(grow(tokenizer, [0], [1, 6, 2, 3, 4, 5, 1], [])) == " world!😀 world"
    assert "".join(grow(tokenizer, [], [1], [])) == "world"


def test_endless_broken_bytes_are_let_go(raw_tokenizer: Tokenizer) -> None:
    """A model that emits only halves of characters gets no slower with every token."""
    [lead] = byte_ids(raw_tokenizer, "😀")[:1]
    detokenizer = Detokenizer(raw_tokenizer, [])
    pieces = [detokenizer.push([lead]) for _ in range(2 * MAX_HELD_TOKENS)]
    assert [i for i, piece in enumerate(pieces) if piece] == [MAX_HELD_TOKENS - 1, 2 * MAX_HELD_TOKENS - 1]
    assert set("".join(pieces)) == {REPLACEMENT}
    assert detokenizer.push(byte_ids(raw_tokenizer, "ok")) == "ok"


def test_an_id_outside_the_vocabulary_has_no_text(raw_tokenizer: Tokenizer) -> None:
    assert "".join(grow(raw_tokenizer, [], [0xFFFF_FFFF, *raw_tokenizer.encode("a").ids], [])) == "a"
