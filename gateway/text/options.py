"""How a client wants an answer's text: which of its tokens are shown, and whether its end is.

Owns vLLM's names for it. ``SHOWN_BY_DEFAULT`` is what OpenAI does and knows no words for.
"""

from __future__ import annotations

import msgspec


class TextOptions(msgspec.Struct, frozen=True):
    """Of all choices of a request."""

    skip_special_tokens: bool = True
    """Special tokens have no text."""
    spaces_between_special_tokens: bool = True
    """Of special tokens that are shown, and decoders that join tokens with spaces."""
    include_stop: bool = False
    """A stop string, and the text of the token that was the end, are a part of the answer."""


SHOWN_BY_DEFAULT = TextOptions()
