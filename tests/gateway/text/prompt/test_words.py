"""Texts by the memory of words: the same ids as from the tokenizer, whatever the text and its borders."""

from __future__ import annotations

import asyncio
import sys
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer
from tokenizers.processors import TemplateProcessing

from microserve.gateway.text.prompt import words as memory
from microserve.gateway.text.prompt.words import Words, split
from microserve.gateway.text.tokenizer import ModelTokenizer
from tests.support.examples import examples
from tests.support.gateway.tokenizers import KINDS

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""As its tokenizer.json has it."""
CORPUS = [
    "the quick brown fox, the lazy dog; it's 1234 o'clock.  Two  spaces\n\n  and"
    " lines\n\tof code:  x = f(a, b)",
    "<|im_start|>user\nHow are you?<|im_end|> na\u00efve 漢字 \u00a0 e\u0301 12 34 don't I'll we're",
]
ALPHABET = st.sampled_from(
    [*"ab1 \n\t\r.,'s<|>é漢", "  ", " \n", "\u00a0", "\u2003", "\u0301", "\x1c", "\x85", "\u200b"]
)
TEXTS = st.lists(
    st.one_of(
        ALPHABET, st.sampled_from(" ".join(CORPUS).split(" ")), st.just("<|im_end|>"), st.text(max_size=3)
    )
).map("".join)


def split_by(pattern: str) -> PreTokenizer:
    parts = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


PRE_TOKENIZERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": split_by(LLAMA_3),
    "qwen": split_by(LLAMA_3.replace("{1,3}", "")),
}


@cache
def trained(kind: str) -> Tokenizer:
    """Merges of whole words, with the spaces before them: a wrong border shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[kind]
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|begin|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if kind == "llama3":
        tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        )
    return tokenizer


def looked_up(tokenizer: ModelTokenizer, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    ids = asyncio.run(tokenizer.encode(texts, add_special_tokens=add_special_tokens, max_tokens=sys.maxsize))
    return list(map(list, ids))


@cache
def remembering(kind: str) -> ModelTokenizer:
    return ModelTokenizer(trained(kind))


@given(kind=st.sampled_from(sorted(PRE_TOKENIZERS)), texts=st.lists(TEXTS, max_size=3), special=st.booleans())
@example(kind="gpt2", texts=["  a  b \n c", " a", "", " ", "\n a"], special=True)
@settings(max_examples=examples(200), deadline=None)
def test_ids_are_those_of_the_whole_text(kind: str, texts: list[str], special: bool) -> None:
    expected = [trained(kind).encode(text, add_special_tokens=special).ids for text in texts]

    for _ in ("new words", "known ones"):
        assert looked_up(remembering(kind), texts, add_special_tokens=special) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_every_character_beside_a_cut(kind: str) -> None:
    """White space is not the same to everybody: each character before, behind and between spaces."""
    tokenizer, known = trained(kind), Words.of(trained(kind))
    assert known is not None
    texts = [f"a{c} b {c}c {c} d" for c in map(chr, [*range(0xD800), *range(0xE000, 0x10000)])]

    whole = tokenizer.encode_batch_fast(texts)
    parts = [[words[0], *(f" {word}" for word in words[1:])] for words in map(split, texts)]
    flat = tokenizer.encode_batch_fast([part for each in parts for part in each], add_special_tokens=False)
    ids = iter(flat)
    for text, each, expected in zip(texts, parts, whole, strict=True):
        found = [id_ for _ in each for id_ in next(ids).ids]
        assert found == expected.ids[-len(found) :], repr(text)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_tokenizers_are_asked_for_whole_texts(kind: str) -> None:
    assert Words.of(KINDS[kind]()) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_tokens([AddedToken("quick brown", normalized=False)]),
        lambda t: t.add_tokens([AddedToken("fox", lstrip=True)]),
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t, "normalizer", normalizers.Replace("x b", "y")),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", split_by(r"o b|\s+")),
        lambda t: setattr(t, "post_processor", TemplateProcessing(single="$A $A", special_tokens=[])),
    ],
)
def test_what_could_cross_a_cut_is_not_trusted(change: object) -> None:
    tokenizer = Tokenizer.from_str(trained("gpt2").to_str())
    assert Words.of(tokenizer) is not None
    assert callable(change)
    change(tokenizer)

    assert Words.of(tokenizer) is None


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_WORDS", 10)
    known = Words.of(trained("gpt2"))
    assert known is not None
    for number in range(20):
        known.remember({f" {number}": [number], "x" * 100: [1]})
        assert len(known) <= 10
        words = ["", str(number)]
        found = known.find(words)
        assert known.new(words, found) == [""]  # of which nothing is known
        assert list(known.joined(words, found, {"": [7]}, add_special_tokens=False)) == [7, number]
