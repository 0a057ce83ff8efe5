"""``/v1/chat/completions``: conversations in, messages out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from microserve.gateway.api.arguments import arguments_of
from microserve.gateway.api.format import Ending, FinishedChoice
from microserve.gateway.openai.answer import OpenAIFormat, encode, name_of
from microserve.gateway.openai.common import options_of, wish_of
from microserve.gateway.openai.grammar import asked_of
from microserve.gateway.openai.messages import ROLES, ContentPart, Message, ToolCall
from microserve.gateway.openai.schema import ChatRequest, TokenizeRequest
from microserve.gateway.openai.tools import tool_use_of
from microserve.gateway.parsing.events import Arguments, CallBegun, Event, Said
from microserve.gateway.request.request import Call, Conversation, GenerateRequest, TemplateOption, Turn
from microserve.gateway.text.answer.choice import Piece
from microserve.gateway.text.answer.transcript import TokenText
from microserve.protocol.errors import InvalidRequest

OPTIONS = ("reasoning_effort", "verbosity", "enable_thinking", "documents", "add_generation_prompt")
"""Variables of a template that have a field of their own."""
ASKS_NOTHING = {"verbosity": "medium", "documents": [], "add_generation_prompt": True}
"""What is so without being said."""
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""Variables of a template that are not the client's to set."""


def chat_request(body: ChatRequest) -> GenerateRequest:
    """Raises :class:`InvalidRequest` naming the message or the field."""
    newer = body.max_completion_tokens
    names = {"prompt": "messages"}
    if newer is not None:
        names["max_tokens"] = "max_completion_tokens"
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs", field="top_logprobs")
    return GenerateRequest(
        prompt=conversation_of(body, body.messages),
        sampling=wish_of(
            body,
            max_tokens=body.max_tokens if newer is None else newer,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        ),
        grammar=asked_of(body),
        tools=tool_use_of(body),
        names=names,
        **options_of(body),
    )


def conversation_of(request: ChatRequest | TokenizeRequest, messages: list[Message]) -> Conversation:
    """Raises :class:`InvalidRequest` naming the message or the field."""
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other",
            field="continue_final_message",
        )
    turns, options = turns_of(messages), _template_options(request)
    return Conversation(turns, options, continues=bool(request.continue_final_message))


def _template_options(request: ChatRequest | TokenizeRequest) -> dict[str, TemplateOption]:
    """The request's values for variables of the template."""
    options: dict[str, TemplateOption] = {}
    for name, value in (request.chat_template_kwargs or {}).items():
        field = f"chat_template_kwargs.{name}"
        if name in RESERVED:
            raise InvalidRequest(f"{field} is not for clients to set", field=field)
        options[name] = TemplateOption(value, field)
    for name in OPTIONS:
        if (value := getattr(request, name, None)) is not None and value != ASKS_NOTHING.get(name):
            options[name] = TemplateOption(value, name)
    if request.continue_final_message:  # nothing is behind the last message, whatever the template does
        options.pop("add_generation_prompt", None)
    return options


def turns_of(messages: list[Message]) -> list[Turn]:
    """Raises :class:`InvalidRequest` naming the message."""
    return [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _turn(message: Message, where: str) -> Turn:
    role = ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(
            f"{where}.role must be one of {', '.join(ROLES)}",
            field=f"{where}.role",
        )
    content = message.content
    if content is None and role == "assistant" and not message.tool_calls:
        content = ""  # a refusal; of these only the text counts here
    if content is None and not message.tool_calls:
        raise InvalidRequest(f"{where}.content is missing", field=f"{where}.content")
    if isinstance(content, list):
        content = "\n".join(_text_of(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if message.tool_calls and role != "assistant":
        raise InvalidRequest(f"{where}.tool_calls: only of the assistant", field=f"{where}.tool_calls")
    thought = message.reasoning if message.reasoning_content is None else message.reasoning_content
    return Turn(
        role=role,
        content=content,
        name=message.name,
        tool_call_id=message.tool_call_id,
        thought=thought or "",
        calls=[
            _call(call, f"{where}.tool_calls[{at}].function.arguments")
            for at, call in enumerate(message.tool_calls or [])
        ],
    )


def _call(call: ToolCall, where: str) -> Call:
    return Call(call.id, call.function.name, arguments_of(call.function.arguments, where))


def _text_of(part: ContentPart, where: str) -> str:
    if part.type != "text":
        raise InvalidRequest(f"{where}.type must be text", field=f"{where}.type")
    if part.text is None:
        raise InvalidRequest(f"{where}.text is missing", field=f"{where}.text")
    return part.text


class ChatFormat(OpenAIFormat):
    id_prefix: ClassVar[str] = "chatcmpl"
    chunk_object: ClassVar[str] = "chat.completion.chunk"
    reply_object: ClassVar[str] = "chat.completion"
    tells_tier: ClassVar[bool] = True

    def opening(self, index: int) -> bytes:
        return self._chunk(
            index, b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        )

    def delta(self, index: int, piece: Piece) -> bytes:
        logprobs = encode(_logprobs(piece.tokens, by_id=self.by_id)) if self.with_logprobs else b"null"
        if piece.events or not piece.text:
            return self._deltas(index, piece.events, logprobs if piece.tokens else b"null")
        return self._chunk(
            index,
            b'"delta":{"content":%b},"logprobs":%b,"finish_reason":null' % (encode(piece.text), logprobs),
        )

    def _deltas(self, index: int, events: Sequence[Event], logprobs: bytes) -> bytes:
        """One chunk each; the log-probabilities are of the text, all of it."""
        chunks = []
        for event in events:
            of_text = b"null"
            if isinstance(event, Said) and event.kind == "content":
                of_text, logprobs = logprobs, b"null"
            chunks.append(
                self._chunk(
                    index,
                    b'"delta":%b,"logprobs":%b,"finish_reason":null' % (encode(event_delta(event)), of_text),
                )
            )
        if logprobs != b"null":  # of tokens without a text of their own
            rest = b'"delta":{"content":""},"logprobs":%b,"finish_reason":null' % logprobs
            chunks.append(self._chunk(index, rest))
        return b"".join(chunks)

    def finish(self, index: int, ending: Ending) -> bytes:
        rest = b'"delta":{},"logprobs":null,"finish_reason":"%b"' % ending.reason.encode()
        return self._last_chunk(index, rest, ending.promise)

    def choice(self, choice: FinishedChoice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": _message(choice),
            "logprobs": _logprobs(choice.tokens, by_id=self.by_id) if self.with_logprobs else None,
            "finish_reason": choice.ending.reason,
        }

    def members(self, choices: Sequence[FinishedChoice]) -> dict[str, Any]:
        return self.prompt_member(choices[0])


def event_delta(event: Event) -> dict[str, Any]:
    """As clients add deltas up: of a call, all but its arguments is said once."""
    match event:
        case Said("reasoning", text):
            return {"reasoning": text, "reasoning_content": text}
        case Said(_, text):
            return {"content": text}
        case CallBegun(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _message(choice: FinishedChoice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.events is None:
        return message
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for event in choice.events:
        match event:
            case Said(kind, text):
                (content if kind == "content" else reasoning).append(text)
            case CallBegun(_, call_id, name):
                calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}})
            case Arguments(index, text):
                calls[index]["function"]["arguments"] += text
    message["content"] = "".join(content) or (None if calls else "")
    if reasoning:
        message["reasoning"] = message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _logprobs(tokens: list[TokenText], *, by_id: bool) -> dict[str, Any]:
    content = [
        _entry(token, by_id=by_id) | {"top_logprobs": [_entry(other, by_id=by_id) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(token: TokenText, *, by_id: bool) -> dict[str, Any]:
    name = name_of(token, by_id=by_id)
    return {"token": name, "logprob": token.logprob, "bytes": list(token.data)}
