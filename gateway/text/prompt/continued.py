"""A conversation whose last message the model is to go on with: the prompt ends where its text does.

Owns the finding of that place in a template's text, by a tag behind the message that nobody can have written.
Knows no templates: whatever one writes behind the tag is left away.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from microserve.protocol.errors import InvalidRequest


class Continued:
    """Of one conversation: ``messages`` are for the template, :meth:`cut` is for what it makes of them."""

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raises :class:`InvalidRequest` (field ``messages``) where the last one has no text."""
        last = messages[-1] if messages else {}
        content = last.get("content")
        if not isinstance(content, str) or last.get("tool_calls"):
            raise InvalidRequest("continue_final_message: the last message has no text", field="messages")
        self._tag = f"[{secrets.token_hex(16)}]"
        # With a blank behind it: where that goes, the template trims texts.
        self.messages = [*messages[:-1], {**last, "content": f"{content}{self._tag} "}]

    def cut(self, text: str) -> str:
        """What the template wrote, up to the end of the last message.

        Raises :class:`InvalidRequest` (field ``messages``) for a template that has not shown it."""
        head, tag, rest = text.rpartition(self._tag)
        if not tag:
            raise InvalidRequest(
                "continue_final_message: the model's chat template does not show the last message",
                field="messages",
            )
        return head if rest.startswith(" ") else head.rstrip()
