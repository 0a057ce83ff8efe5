"""A tiny tokenizer of each kind that models come with, and what a text is by its tokens' bytes alone."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.decoders import Decoder

WORDS = ["the", "mesh", "he", "ll", "o", "world", "na", "ï", "漢", "don", "n't"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<s>", "</s>", "<unk>"]


def byte_fallback() -> Tokenizer:
    """Llama 2's and Mistral 0.1's: ``▁`` is a space, dropped at a text's start, and ``<0xE4>`` a byte."""
    pieces = [*SPECIAL, *BYTES, "▁", *WORDS, *(f"▁{word}" for word in WORDS), "a", "b", "!", ".", "▁▁"]
    tokenizer = Tokenizer(
        models.BPE(vocab=_numbered(pieces), merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_special(tokenizer)


def unigram() -> Tokenizer:
    """T5's kind: Metaspace, no bytes; what looks like a byte is text."""
    pieces = [*SPECIAL, "<0x41>", "▁", *WORDS, *(f"▁{word}" for word in WORDS), "a", "b", "!", "▁▁"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_special(tokenizer)


def byte_level() -> Tokenizer:
    """GPT-2's: every byte a printable character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab=_numbered([*SPECIAL, *alphabet, "Ġt", "he", "Ġm", "esh"]), merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(" 漢 tool", special=False)])
    return _with_special(tokenizer)


def word_piece() -> Tokenizer:
    """BERT's: ``##`` continues a word, and spaces before punctuation go."""
    pieces = [*SPECIAL, *WORDS, *(f"##{word}" for word in WORDS), ".", ",", "'", "##s"]
    tokenizer = Tokenizer(models.WordPiece(_numbered(pieces), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_special(tokenizer)


def suffixed() -> Tokenizer:
    """GPT's first kind: ``</w>`` ends a word, and the last word has no space behind it."""
    pieces = [*SPECIAL, *WORDS, *(f"{word}</w>" for word in WORDS)]
    return _with_special(_decoded(pieces, decoders.BPEDecoder()))


def bare() -> Tokenizer:
    """No decoder: words with a space between them."""
    return _with_special(_decoded([*SPECIAL, *WORDS], None))


KINDS = {
    "byte_fallback": byte_fallback,
    "unigram": unigram,
    "byte_level": byte_level,
    "word_piece": word_piece,
    "suffixed": suffixed,
    "bare": bare,
}


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text as one token a byte, of a byte-fallback tokenizer."""
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    return [each for each in ids if each is not None]


def ids_of(tokenizer: Tokenizer, tokens: Sequence[str]) -> list[int]:
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in ids
    return [each for each in ids if each is not None]


def _numbered(pieces: Sequence[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(pieces)}


def _decoded(pieces: Sequence[str], decoder: Decoder | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=_numbered(pieces), merges=[]))
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def _with_special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer
