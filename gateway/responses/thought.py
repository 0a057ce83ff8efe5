"""A thought as ``encrypted_content``: clients that keep nothing else of it send it back.

It stands in the clear beside it, so nothing is hidden: the name is OpenAI's.
"""

from __future__ import annotations

from base64 import b64decode, urlsafe_b64encode

_MARK = "ms1."


def sealed(thought: str) -> str:
    return _MARK + urlsafe_b64encode(thought.encode()).decode()


def opened(content: str) -> str | None:
    """None for what is not ours."""
    if not content.startswith(_MARK):
        return None
    try:
        return b64decode(content.removeprefix(_MARK), altchars=b"-_", validate=True).decode()
    except ValueError:
        return None
