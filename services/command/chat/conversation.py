"""What was said and how the next answer is to be made: state, and the body of the next request. Pure.

A change is whole or not at all, since Ctrl-C may come at any time: messages are replaced, never edited.
"""

from __future__ import annotations

from typing import Any

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.services.command.chat.answer import Answer

Message = dict[str, Any]


class Wishes(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of answers; None and empty: the server's own."""

    model: str = ""
    system: str = ""
    strategy: str = ""
    temperature: float | None = None
    max_tokens: int | None = None
    tools: list[dict[str, Any]] = []


class Saved(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A file of ``/save``."""

    wishes: Wishes
    messages: list[Message]


class Conversation:
    def __init__(self, wishes: Wishes) -> None:
        self.wishes = wishes
        self.messages: tuple[Message, ...] = ()
        """Without the system's."""
        self.unanswered: Message | None = None
        """The last question, if it got no answer: it is not in ``messages``, and may be asked again."""
        self.num_prompt_tokens = self.num_answer_tokens = 0
        """Of the last answer."""
        self.num_all_tokens = 0
        """Of all answers and their prompts."""

    def body(self, question: Message | None = None) -> dict[str, Any]:
        """Of ``/v1/chat/completions``. ``question``: None where results of tools are what is answered."""
        wishes = self.wishes
        system = [{"role": "system", "content": wishes.system}] if wishes.system else []
        asked = [] if question is None else [question]
        body: dict[str, Any] = {"model": wishes.model, "messages": [*system, *self.messages, *asked]}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        for name in ("temperature", "max_tokens"):
            if getattr(wishes, name) is not None:
                body[name] = getattr(wishes, name)
        if wishes.tools:
            body["tools"] = wishes.tools
        return body

    def answered(self, question: Message | None, answer: Answer) -> None:
        """What came stays, also of an answer that was stopped or cut off; a question without any does not."""
        asked = [] if question is None else [question]
        if answer.has_anything:
            self.messages = (*self.messages, *asked, answer.message())
            self.unanswered = None
        else:
            self.unanswered = question
        if answer.num_answer_tokens:
            self.num_prompt_tokens, self.num_answer_tokens = (
                answer.num_prompt_tokens,
                answer.num_answer_tokens,
            )
            self.num_all_tokens += answer.num_prompt_tokens + answer.num_answer_tokens

    def tool_result(self, call_id: str, content: str) -> None:
        self.messages = (*self.messages, {"role": "tool", "tool_call_id": call_id, "content": content})

    def undo(self) -> Message | None:
        """Take the last question and all behind it back; returns it, None if there is none."""
        if self.unanswered is not None:
            question, self.unanswered = self.unanswered, None
            return question
        for at in range(len(self.messages) - 1, -1, -1):
            if self.messages[at].get("role") == "user":
                question = self.messages[at]
                self.messages = self.messages[:at]
                return question
        return None

    def clear(self) -> None:
        self.messages, self.unanswered = (), None

    # --- files -------------------------------------------------------------------------------------

    def saved(self) -> bytes:
        """As JSON that :meth:`load` reads."""
        return msgspec.json.format(msgspec.json.encode(Saved(wishes=self.wishes, messages=[*self.messages])))

    def load(self, text: bytes) -> None:
        """What was saved instead of what is here. Raises :class:`ConfigError`."""
        try:
            saved = msgspec.json.decode(text, type=Saved)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not a saved chat: {error}") from None
        if not all(isinstance(each.get("role"), str) for each in saved.messages):
            raise ConfigError("not a saved chat: a message has no role")
        self.messages, self.unanswered, self.wishes = tuple(saved.messages), None, saved.wishes


def read_tools(text: bytes) -> list[dict[str, Any]]:
    """OpenAI's ``tools``, or the functions alone. Raises :class:`ConfigError`."""
    try:
        found = msgspec.json.decode(text, type=list[dict[str, Any]])
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not a list of tools: {error}") from None
    tools = [each if "function" in each else {"type": "function", "function": each} for each in found]
    for each in tools:
        if not isinstance(each["function"], dict) or not isinstance(each["function"].get("name"), str):
            raise ConfigError("a tool has no name")
    return tools
