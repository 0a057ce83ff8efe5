"""What a token is, for every kind of tokenizer: its share of the text, whatever stands before it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from microserve.gateway.text.detokenizer import Detokenizer
from microserve.gateway.text.options import TextOptions
from microserve.gateway.text.vocabulary import Vocabulary, text_of
from tests.support.gateway.tokenizers import KINDS, byte_fallback, byte_ids, byte_level, ids_of

TOKENIZERS = {kind: make() for kind, make in KINDS.items()}
VOCABULARIES = {kind: Vocabulary(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
kinds = st.sampled_from(sorted(KINDS))
numbers = st.lists(st.integers(0, 299), max_size=12)


def streamed(kind: str, prompt: list[int], ids: list[int], cuts: list[int]) -> tuple[str, list[bytes]]:
    """The text, in pieces as ``cuts`` has them, and the shares, one by one."""
    whole = Detokenizer(VOCABULARIES[kind], prompt)
    pieces, position = [], 0
    for size in [*cuts, len(ids)]:
        pieces.append(whole.push(ids[position : position + size]))
        position += size
    single = Detokenizer(VOCABULARIES[kind], prompt)
    return "".join([*pieces, whole.flush()]), [single.step(each)[0] for each in ids]


def added(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str | None:
    """What decoding the answer adds to decoding the prompt; None where it changes the prompt's own text, or
    where the decoder throws away whole characters together with a broken one beside them."""
    before, both = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    return (
        both[len(before) :] if both.startswith(before) and "\N{REPLACEMENT CHARACTER}" not in both else None
    )


@given(kind=kinds, prompt=numbers, ids=numbers, cuts=st.lists(st.integers(0, 4), max_size=8))
def test_an_answer_is_what_decoding_it_behind_its_prompt_adds(
    kind: str, prompt: list[int], ids: list[int], cuts: list[int]
) -> None:
    size = TOKENIZERS[kind].get_vocab_size()
    prompt, ids = [each % size for each in prompt], [each % size for each in ids]
    text, shares = streamed(kind, prompt, ids, cuts)
    assert b"".join(shares).decode("utf-8", "replace") == text
    expected = added(TOKENIZERS[kind], prompt, ids)
    if expected is not None:
        assert text == expected


@given(ids=numbers, cuts=st.lists(st.integers(0, 4), max_size=8))
def test_bytes_that_are_no_text_are_what_decoding_them_at_once_gives(ids: list[int], cuts: list[int]) -> None:
    text, _ = streamed("byte_level", [], ids, cuts)
    assert text == TOKENIZERS["byte_level"].decode(ids)


def test_a_prompt_that_ends_in_characters_made_of_bytes() -> None:
    """D2: five tokens back there is half a character, and the answer lost its first space."""
    tokenizer = byte_fallback()
    prompt = [*ids_of(tokenizer, ["▁the"]), *byte_ids(tokenizer, "😀😀")]
    assert streamed("byte_fallback", prompt, ids_of(tokenizer, ["▁mesh"]), [])[0] == " mesh"


def test_special_tokens_of_a_prompt_are_no_text_before_the_answer() -> None:
    tokenizer = byte_fallback()
    start, the = ids_of(tokenizer, ["<s>", "▁the"])
    assert streamed("byte_fallback", [start], [the, the], [])[0] == "the the"
    assert streamed("byte_fallback", [the, start], [the, start, the], [])[0] == " the the"


@pytest.mark.parametrize(
    ("kind", "tokens", "shares"),
    [
        ("byte_fallback", ["▁the", "▁mesh", "<0xE4>", "<0x20>"], [" the", " mesh", b"\xe4", " "]),
        ("unigram", ["▁the", "<0x41>", "▁mesh"], [" the", "<0x41>", " mesh"]),
        ("byte_level", ["Ġt", "he", "ä", "<s>"], [" t", "he", b"\xe4", ""]),
        ("word_piece", ["the", "##mesh", ".", "n't"], [" the", "mesh", ".", "n't"]),
        ("suffixed", ["the</w>", "he", "ll</w>", "o"], [" the", " he", "ll", " o"]),
        ("bare", ["the", "mesh"], [" the", " mesh"]),
    ],
)
def test_shares(kind: str, tokens: list[str], shares: list[str | bytes]) -> None:
    tokenizer = TOKENIZERS[kind]
    before = ids_of(
        tokenizer, ["world</w>" if kind == "suffixed" else "a" if kind == "byte_level" else "world"]
    )
    expected = [share if isinstance(share, bytes) else share.encode() for share in shares]
    assert streamed(kind, before, ids_of(tokenizer, tokens), [])[1] == expected


def test_names() -> None:
    assert text_of("é".encode()) == "é"
    assert text_of(b"\xe4\xbd") == r"bytes:\xe4\xbd"
    assert text_of(b" \xf0\x9f") == r"bytes: \xf0\x9f"
    vocabulary, [end] = Vocabulary(byte_level()), ids_of(byte_level(), ["</s>"])
    assert (vocabulary.share(end, None), vocabulary.name(end, b"")) == (b"", "</s>")
    assert vocabulary.name(0xFFFF_FFFF, vocabulary.share(0xFFFF_FFFF, None)) == ""


SHOWN = {
    kind: Vocabulary(tokenizer, TextOptions(skip_special_tokens=False))
    for kind, tokenizer in TOKENIZERS.items()
}


@given(kind=kinds, ids=numbers)
def test_with_special_tokens_an_answer_is_what_decoding_it_with_them_gives(kind: str, ids: list[int]) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = [each % tokenizer.get_vocab_size() for each in ids]
    detokenizer = Detokenizer(SHOWN[kind], [])
    text = detokenizer.push(ids) + detokenizer.flush()
    expected = tokenizer.decode(ids, skip_special_tokens=False)
    if "\N{REPLACEMENT CHARACTER}" not in expected:
        assert text == expected


@pytest.mark.parametrize(
    ("kind", "spaced", "text"),
    [
        ("bare", True, "the <s> </s> mesh"),
        ("bare", False, "the <s></s> mesh"),
        ("word_piece", True, "the <s> </s> mesh"),
        ("word_piece", False, "the <s></s> mesh"),
        ("byte_level", True, "he<s></s>he"),
        ("byte_level", False, "he<s></s>he"),
    ],
)
def test_spaces_between_special_tokens(kind: str, spaced: bool, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    words = ["he", "he"] if kind == "byte_level" else ["the", "mesh"]
    ids = ids_of(tokenizer, [words[0], "<s>", "</s>", words[1]])
    options = TextOptions(skip_special_tokens=False, spaces_between_special_tokens=spaced)
    assert Detokenizer(Vocabulary(tokenizer, options), []).push(ids) == text
