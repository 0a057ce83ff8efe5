"""What a token is: its share of the text, in bytes.

    share(token, behind previous) = what decoding it behind that token adds

Joined, the shares of an answer's tokens are the answer; a character may be spread over several of them. Owns
the reading of the tokenizer's decoder: byte-level ones and ``<0xE4>`` tell bytes, every other one is asked
what a token adds behind its predecessor, so spaces that it drops at a text's start, or joins words with, are
right.
Knows nothing of streams or answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial

from tokenizers import Tokenizer

from microserve.gateway.text.options import SHOWN_BY_DEFAULT, TextOptions

MAX_REMEMBERED = 1 << 15
"""Pairs of tokens whose share is not asked for again; of 150 bytes each."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Vocabulary:
    """Of one tokenizer; shared by all who make text of its tokens in the same way."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions = SHOWN_BY_DEFAULT) -> None:
        self._tokenizer = tokenizer
        self._skips_special = options.skip_special_tokens
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._hidden = self._special if options.skip_special_tokens else set[int]()
        apart = options.skip_special_tokens or options.spaces_between_special_tokens
        self._joined = {} if apart else {token_id: token.content for token_id, token in added.items()}
        """Added tokens that stand behind each other as they are written."""
        decoder = tokenizer.decoder
        # By what it does: decoders come in sequences, and these in sequences.
        is_byte_level = decoder is not None and (
            decoder.decode(["Ġ"]) == " " and decoder.decode(["ä", "½", "ł"]) == "你"
        )
        self.fixed = _ByteLevel(tokenizer, self._hidden) if is_byte_level else None
        """Shares by id, where they do not depend on what stands before."""
        self._share_behind = lru_cache(maxsize=MAX_REMEMBERED)(self._ask)
        self._has_byte_tokens = decoder is not None and decoder.decode(["<0x41>"]) == "A"

    def is_hidden(self, token_id: int) -> bool:
        """Special, where these are not shown, or no token at all: it has no share of a text."""
        return token_id in self._hidden or self._tokenizer.id_to_token(token_id) is None

    def share(self, token_id: int, previous: int | None) -> bytes:
        """What ``token_id`` adds behind ``previous``, the last token that is not hidden; None: at a start."""
        return self._share_behind(token_id, previous) if self.fixed is None else self.fixed[token_id]

    def _ask(self, token_id: int, previous: int | None) -> bytes:
        """The decoder."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._hidden:
            return b""
        if previous in self._joined and token_id in self._joined:
            return self._joined[token_id].encode()
        decode = partial(self._tokenizer.decode, skip_special_tokens=self._skips_special)
        if self._has_byte_tokens and (byte := _byte_of(token)) is not None:
            alone = decode([token_id])
            # A byte that is a whole character may be a space that is dropped at the start.
            return byte if previous is not None or REPLACEMENT in alone else alone.encode()
        if previous is not None:
            before, both = decode([previous]), decode([previous, token_id])
            if both.startswith(before):
                return both[len(before) :].encode()
        return decode([token_id]).encode()

    def last_shown(self, token_ids: Sequence[int]) -> int | None:
        """The last one that is not hidden."""
        return next((each for each in reversed(token_ids) if not self.is_hidden(each)), None)

    def name(self, token_id: int, share: bytes) -> str:
        """As ``logprobs`` name a token with that share: a special one by itself, others as ``text_of``."""
        if token_id in self._special:
            return self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text_of(share)


def text_of(share: bytes) -> str:
    """The text of a token by itself; one that is a part of a character in OpenAI's form, ``bytes:\\xe4``."""
    try:
        return share.decode()
    except UnicodeDecodeError:
        shown = (chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in share)
        return "bytes:" + "".join(shown)


class _ByteLevel(dict[int, bytes]):
    """Bytes by id, for decoders that write each byte as one printable character."""

    def __init__(self, tokenizer: Tokenizer, hidden: Iterable[int]) -> None:
        super().__init__(dict.fromkeys(hidden, b""))
        self._tokenizer = tokenizer
        self._alphabet = _byte_level_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # not remembered: ids come from outside
            return b""
        if all(character in self._alphabet for character in token):
            data = bytes(self._alphabet[character] for character in token)
        else:  # an added token, written as it is
            data = token.encode()
        self[token_id] = data
        return data


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: printable Latin-1 is itself, the rest follows U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _byte_of(token: str) -> bytes | None:
    """``<0xE4>``"""
    if len(token) != 6 or not (token.startswith("<0x") and token.endswith(">")):
        return None
    try:
        return bytes.fromhex(token[3:5])
    except ValueError:
        return None
