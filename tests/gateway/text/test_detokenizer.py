"""Text that grows: whole characters only, and in the end exactly what decoding everything at once gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from microserve.gateway.text.detokenizer import Detokenizer
from microserve.gateway.text.vocabulary import REPLACEMENT, Vocabulary
from tests.support.gateway.gateway_world import special_id

TEXT = st.text(alphabet=st.sampled_from("abc Hello,😀👩‍🚀漢字éÅ\n\t\U0001f1e9\U0001f1ea"), max_size=40)


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text as one token a byte: every border between bytes is a border between tokens."""
    vocabulary = Vocabulary(tokenizer)
    shares = ((vocabulary.share(i, None), i) for i in range(tokenizer.get_vocab_size()))
    by_byte = {share: i for share, i in shares if len(share) == 1}
    return [by_byte[bytes([byte])] for byte in text.encode()]


def grow(tokenizer: Tokenizer, prompt: list[int], ids: list[int], cuts: list[int]) -> list[str]:
    """Pieces for the ids handed over in chunks of the sizes ``cuts``, then one by one, then the flush."""
    detokenizer = Detokenizer(Vocabulary(tokenizer), prompt)
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
    """Random bytes too, even those that never become a character."""
    assert "".join(grow(raw_tokenizer, [], ids, cuts)) == raw_tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_flushed_as_a_replacement(raw_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(Vocabulary(raw_tokenizer), [])
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


def test_broken_bytes_are_shown_as_soon_as_they_are_known_to_be(raw_tokenizer: Tokenizer) -> None:
    """A model that emits only halves of characters gets no slower with every token."""
    [lead] = byte_ids(raw_tokenizer, "😀")[:1]
    detokenizer = Detokenizer(Vocabulary(raw_tokenizer), [])
    assert [detokenizer.push([lead]) for _ in range(3)] == ["", REPLACEMENT, REPLACEMENT]
    assert detokenizer.push(byte_ids(raw_tokenizer, "ok")) == f"{REPLACEMENT}ok"


def test_an_id_outside_the_vocabulary_has_no_text(raw_tokenizer: Tokenizer) -> None:
    assert "".join(grow(raw_tokenizer, [], [0xFFFF_FFFF, *raw_tokenizer.encode("a").ids], [])) == "a"
