"""A request's prompts -> token ids, with the chat template's help; what cannot be one is named.

Owns how turns look to a template, and what a template does not look at. Renders nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, assert_never

import msgspec

from microserve.gateway.request.request import Conversation, GenerateRequest, Ids, TemplateOption, Texts, Turn
from microserve.gateway.routers.link import ModelLimits
from microserve.gateway.text.prompt.chat_template import REFUSED, ChatTemplate
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.errors import InvalidRequest, RequestError

MAX_CUT_TOKENS = 1 << 20
"""A prompt that is to be cut may have so many before."""


async def prompts_of(
    request: GenerateRequest, tokenizer: ModelTokenizer, limits: ModelLimits
) -> Sequence[Sequence[int]]:
    """Ids of every prompt, in order; what a template does not look at is a warning of the request's. Raises
    :class:`InvalidRequest` naming the field."""
    prompt, field = request.prompt, request.name_of("prompt")
    num_kept = _num_kept(request, limits.max_model_len)
    most = limits.max_model_len if num_kept is None else MAX_CUT_TOKENS
    given: Sequence[Sequence[int]]
    match prompt:
        case Conversation():
            shown = None if request.tools is None else request.tools.shown
            request.warnings = [*request.warnings, *unheard(prompt.options, tokenizer.template)]
            given = [await encoded(prompt, shown, tokenizer, max_tokens=most, field=field)]
        case Ids():
            given = prompt.prompts
            for ids in given:
                if ids and max(ids) >= limits.vocab_size:
                    raise InvalidRequest(f"{field} has ids outside 0 to {limits.vocab_size - 1}", field=field)
        case Texts():
            given = await tokenizer.encode(
                prompt.texts, add_special_tokens=prompt.add_special_tokens, max_tokens=most, field=field
            )
        case _:
            assert_never(prompt)
    if not all(given):
        raise InvalidRequest(f"{field} must have at least one token", field=field)
    return given if num_kept is None else [ids[-num_kept:] for ids in given]


def _num_kept(request: GenerateRequest, max_model_len: int) -> int | None:
    """Tokens of a prompt that are kept, at least one; None: all of them, or it is refused."""
    wish, field = request.truncate_prompt_tokens, "truncate_prompt_tokens"
    if wish is None:
        return None
    if wish > max_model_len:
        raise InvalidRequest(f"{field} must be at most {max_model_len}, the context's length", field=field)
    if wish > 0:
        return wish
    sampling = request.sampling
    return max(max_model_len - (sampling.max_tokens or sampling.default_max_tokens or 1), 1)


async def encoded(
    conversation: Conversation,
    tools: Sequence[dict[str, Any]] | None,
    tokenizer: ModelTokenizer,
    *,
    max_tokens: int,
    field: str,
) -> Sequence[int]:
    """Ids of a conversation, ready for the assistant's answer. Raises :class:`InvalidRequest`."""
    template = tokenizer.template
    check_template(template, tools, conversation.options)
    options = {
        name: option.value
        for name, option in conversation.options.items()
        if template is not None and template.knows(name)
    }
    try:
        return await tokenizer.encode_chat(
            template_messages(conversation.turns),
            tools,
            options,
            max_tokens=max_tokens,
            continues=conversation.continues,
        )
    except RequestError as error:
        if conversation.folds_system and error.detail.startswith(REFUSED):
            folded = msgspec.structs.replace(
                conversation, turns=without_late_system(conversation.turns), folds_system=False
            )
            if folded.turns != conversation.turns:
                return await encoded(folded, tools, tokenizer, max_tokens=max_tokens, field=field)
        if error.field == "messages":  # which is what templates call them
            error.field = field
        raise


def without_late_system(turns: Sequence[Turn]) -> list[Turn]:
    """Instructions in the midst of a conversation as words of the user's, whose turns in a row are one."""
    found: list[Turn] = []
    for turn in turns:
        said = turn
        if turn.role == "system" and found:
            said = Turn(role="user", content=turn.content)
        if found and found[-1].role == said.role == "user":
            content = "\n".join(filter(None, (found[-1].content, said.content)))
            said = msgspec.structs.replace(found.pop(), content=content)
        found.append(said)
    return found


def check_template(
    template: ChatTemplate | None, tools: object, options: Mapping[str, TemplateOption]
) -> None:
    """What a template does not look at would be dropped without a word. Raises :class:`InvalidRequest`."""
    if template is None:
        return  # which is said where it is rendered
    wanted = {"tools": "tools"} if tools else {}
    wanted |= {name: option.field for name, option in options.items() if not option.is_hint}
    for name, field in wanted.items():
        if not template.knows(name):
            raise InvalidRequest(_no_place_for(field), field=field)


def unheard(options: Mapping[str, TemplateOption], template: ChatTemplate | None) -> list[str]:
    """Hints that a template does not look at, in words."""
    return [
        _no_place_for(option.field)
        for name, option in options.items()
        if option.is_hint and template is not None and not template.knows(name)
    ]


def _no_place_for(field: str) -> str:
    return f"the model's chat template has no place for {field}"


def template_messages(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    """Turns as published templates expect them."""
    return [_template_message(turn) for turn in turns]


def _template_message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.name is not None:
        message["name"] = turn.name
    if turn.tool_call_id is not None:
        message["tool_call_id"] = turn.tool_call_id
    if turn.thought:
        message["reasoning_content"] = turn.thought
    if turn.calls:  # templates write arguments themselves: they get the object, not its JSON
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.calls
        ]
    return message
