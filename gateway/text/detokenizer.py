"""Token ids of one choice -> text, as it grows; never half a character.

Owns the bytes whose character is not whole yet. Knows nothing of stop strings. The text is the tokens' shares
(vocabulary.py), joined and read as UTF-8: the same however the ids were cut into pieces. What is no UTF-8
becomes U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from microserve.gateway.text.vocabulary import Vocabulary


class Detokenizer:
    """One choice's decoding state."""

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> None:
        self.previous = vocabulary.last_shown(prompt_ids)
        """The last token with text, first the prompt's: some decoders drop a space at a start."""
        self.pending = b""
        """The beginning of a character: at most three bytes."""
        self._vocabulary = vocabulary

    def step(self, token_id: int) -> tuple[bytes, str]:
        """The token's share, and the text that it completes; empty while a character is incomplete."""
        vocabulary = self._vocabulary
        share = vocabulary.share(token_id, self.previous)
        if share or not vocabulary.is_hidden(token_id):
            self.previous = token_id
        return share, self._decode(share)

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that ``token_ids`` complete."""
        fixed = self._vocabulary.fixed
        if fixed is not None:
            return self._decode(b"".join([fixed[token_id] for token_id in token_ids]))
        return "".join([self.step(token_id)[1] for token_id in token_ids])

    def flush(self) -> str:
        """The text of what is held: half a character as U+FFFD. Nothing may be pushed after it."""
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, *, final: bool = False) -> str:
        data = self.pending + data
        text, num_read = codecs.utf_8_decode(data, "replace", final)
        self.pending = data[num_read:]
        return text
