"""``/v1/chat/completions``: conversations in, messages out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from microserve.gateway.openai.answer import AnswerFormat, FinishedChoice, encode
from microserve.gateway.openai.schema import ROLES, ChatRequest, ContentPart, Message
from microserve.gateway.routers.link import ModelLimits
from microserve.gateway.text.choice import Piece
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.gateway.text.transcript import TokenText
from microserve.protocol.errors import InvalidRequest


async def chat_prompts(
    request: ChatRequest, tokenizer: ModelTokenizer, limits: ModelLimits
) -> Sequence[Sequence[int]]:
    """The one prompt of a conversation. Raises :class:`InvalidRequest` naming the message."""
    messages = template_messages(request.messages)
    return [await tokenizer.encode_chat(messages, max_tokens=limits.max_model_len)]


def template_messages(messages: list[Message]) -> list[dict[str, str]]:
    """Messages as templates expect them: ``role``, ``content`` (text) and perhaps ``name``."""
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _template_message(message: Message, where: str) -> dict[str, str]:
    role = ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(
            f"{where}.role must be one of {', '.join(ROLES)} (tools are not supported)",
            field=f"{where}.role",
        )
    if message.tool_calls:
        raise InvalidRequest(f"{where}.tool_calls is not supported", field=f"{where}.tool_calls")
    content = message.content
    if content is None and role == "assistant":
        content = ""  # a turn of tool calls or a refusal; of these only the text counts here
    if content is None:
        raise InvalidRequest(f"{where}.content is missing", field=f"{where}.content")
    if not isinstance(content, str):
        content = "\n".join(_text_of(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    rendered = {"role": role, "content": content}
    if message.name is not None:
        rendered["name"] = message.name
    return rendered


def _text_of(part: ContentPart, where: str) -> str:
    if part.type != "text":
        raise InvalidRequest(f"{where}.type must be text", field=f"{where}.type")
    if part.text is None:
        raise InvalidRequest(f"{where}.text is missing", field=f"{where}.text")
    return part.text


class ChatFormat(AnswerFormat):
    id_prefix: ClassVar[str] = "chatcmpl"
    chunk_object: ClassVar[str] = "chat.completion.chunk"
    reply_object: ClassVar[str] = "chat.completion"

    def opening(self, index: int) -> bytes:
        return self._chunk(
            index, b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        )

    def delta(self, index: int, piece: Piece) -> bytes:
        logprobs = encode(_logprobs(piece.tokens)) if self.with_logprobs else b"null"
        return self._chunk(
            index,
            b'"delta":{"content":%b},"logprobs":%b,"finish_reason":null' % (encode(piece.text), logprobs),
        )

    def finish(self, index: int, reason: str, promise: str) -> bytes:
        rest = b'"delta":{},"logprobs":null,"finish_reason":"%b"' % reason.encode()
        return self._last_chunk(index, rest, promise)

    def choice(self, choice: FinishedChoice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": _logprobs(choice.tokens) if self.with_logprobs else None,
            "finish_reason": choice.finish_reason,
        }


def _logprobs(tokens: list[TokenText]) -> dict[str, Any]:
    content = [_entry(token) | {"top_logprobs": [_entry(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _entry(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}
