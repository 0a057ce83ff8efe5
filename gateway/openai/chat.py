"""``/v1/chat/completions``: conversations in, messages out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from microserve.gateway.openai.answer import AnswerFormat, FinishedChoice, encode
from microserve.gateway.openai.schema import ROLES, ChatRequest, ContentPart, Message, ToolCall
from microserve.gateway.openai.tools import tool_use_of
from microserve.gateway.parsing.events import Arguments, CallBegun, Event, Said
from microserve.gateway.parsing.parsers import ModelParsers, Wanted
from microserve.gateway.parsing.typed import schemas_of
from microserve.gateway.routers.link import ModelLimits
from microserve.gateway.text.chat_template import ChatTemplate
from microserve.gateway.text.choice import Piece
from microserve.gateway.text.reading import Reading
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.gateway.text.transcript import TokenText
from microserve.protocol.errors import InvalidRequest

OPTIONS = ("reasoning_effort", "enable_thinking")
"""Variables of a template that have a field of their own."""
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""Variables of a template that are not the client's to set."""


async def chat_prompts(
    request: ChatRequest, tokenizer: ModelTokenizer, limits: ModelLimits
) -> Sequence[Sequence[int]]:
    """The one prompt of a conversation. Raises :class:`InvalidRequest` naming the message or the field."""
    messages = template_messages(request.messages)
    use = tool_use_of(request)
    tools = None if use is None else use.shown
    options = template_options(request)
    check_template(tokenizer.template, tools, options)
    return [await tokenizer.encode_chat(messages, tools, options, max_tokens=limits.max_model_len)]


def chat_reading(request: ChatRequest, parsers: ModelParsers) -> Reading | None:
    """How the answers are read; None where they are text and nothing else. Raises :class:`InvalidRequest`."""
    use = tool_use_of(request)
    if use is None:
        return Reading(parsers, Wanted()) if parsers.thoughts is not None else None
    if parsers.tools is None:
        raise InvalidRequest(
            "tools is not supported: it is not known how this model calls them (model.tool_parser)",
            field="tools",
        )
    types = {name: schemas_of(function.parameters) for name, function in use.callable.items()}
    return Reading(parsers, Wanted(types, use.one_only), use.mode == "named")


def template_options(request: ChatRequest) -> dict[str, Any]:
    """The request's values for variables of the template."""
    options = dict(request.chat_template_kwargs or {})
    for name in RESERVED:
        if name in options:
            field = f"chat_template_kwargs.{name}"
            raise InvalidRequest(f"{field} is not for clients to set", field=field)
    for name in OPTIONS:
        if (value := getattr(request, name)) is not None:
            options[name] = value
    return options


def check_template(template: ChatTemplate | None, tools: object, options: Mapping[str, Any]) -> None:
    """What a template does not look at would be dropped without a word. Raises :class:`InvalidRequest`."""
    if template is None:
        return  # which is said where it is rendered
    for name in (*(["tools"] if tools else []), *options):
        if not template.knows(name):
            field = name if name in ("tools", *OPTIONS) else f"chat_template_kwargs.{name}"
            raise InvalidRequest(f"the model's chat template has no place for {field}", field=field)


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: ``role``, ``content`` (text) and what else the message has."""
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _template_message(message: Message, where: str) -> dict[str, Any]:
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
    rendered: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    thought = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if thought:
        rendered["reasoning_content"] = thought
    if message.tool_calls:
        if role != "assistant":
            raise InvalidRequest(f"{where}.tool_calls: only of the assistant", field=f"{where}.tool_calls")
        rendered["tool_calls"] = [
            _template_call(call, f"{where}.tool_calls[{at}].function.arguments")
            for at, call in enumerate(message.tool_calls)
        ]
    return rendered


def _template_call(call: ToolCall, where: str) -> dict[str, Any]:
    """Templates write arguments themselves: they get the object, not its JSON."""
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}")
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{where} must be the JSON of an object", field=where)
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


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

    def finish(self, index: int, reason: str, promise: str) -> bytes:
        rest = b'"delta":{},"logprobs":null,"finish_reason":"%b"' % reason.encode()
        return self._last_chunk(index, rest, promise)

    def choice(self, choice: FinishedChoice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": _message(choice),
            "logprobs": _logprobs(choice.tokens) if self.with_logprobs else None,
            "finish_reason": choice.finish_reason,
        }


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


def _logprobs(tokens: list[TokenText]) -> dict[str, Any]:
    content = [_entry(token) | {"top_logprobs": [_entry(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _entry(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}
