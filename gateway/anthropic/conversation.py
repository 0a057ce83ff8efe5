"""Messages made of blocks -> turns as the core knows them. Pure functions.

Owns the order of things within a message: results of tools are turns of their own, before what the user says;
thoughts and calls go with the assistant's text. Knows nothing of tools' schemas.
"""

from __future__ import annotations

from collections.abc import Sequence

from microserve.gateway.anthropic.schema import (
    Block,
    InputMessage,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from microserve.gateway.request.request import Call, Turn
from microserve.protocol.errors import InvalidRequest

BILLING_HEADER = "x-anthropic-billing-header:"
"""A block of the system's that begins so is an agent's word to Anthropic's servers, another one in each
request: no text for a model, and behind it no prefix would be found in a cache."""
FAILED = "Error: "
"""Before the text of a result with ``is_error``: templates have no other place for it."""


def turns_of(system: str | list[TextBlock] | None, messages: Sequence[InputMessage]) -> list[Turn]:
    """The conversation; messages of one role in a row are one turn. Raises :class:`InvalidRequest` naming the
    block."""
    turns: list[Turn] = []
    if isinstance(system, str):
        turns.append(Turn(role="system", content=system))
    elif system:
        turns.append(Turn(role="system", content=_system_text(system)))
    names: dict[str, str] = {}
    """Of the tools that were called, by the call's id."""
    for at, message in enumerate(messages):
        where = f"messages[{at}].content"
        match message.role:
            case "system":
                new = [_system_turn(message, where)]
            case "assistant":
                new = [_assistant_turn(message, where, names)]
            case "user":
                new = _user_turns(message, where, names)
        for turn in new:
            _append(turns, turn)
    if turns[-1].role == "assistant" and turns[-1].calls:
        field = f"messages[{len(messages) - 1}]"
        raise InvalidRequest(f"{field}: the results of its calls are missing", field=field)
    return turns


def _append(turns: list[Turn], turn: Turn) -> None:
    """Many templates refuse two turns of one role in a row; results of tools stand each for itself."""
    last = turns[-1] if turns else None
    if last is None or last.role != turn.role or turn.role == "tool":
        turns.append(turn)
        return
    if last.content and turn.content:
        last.content += f"\n{turn.content}"
    else:
        last.content = last.content or turn.content
    last.thought += turn.thought
    last.calls = [*last.calls, *turn.calls]


def _system_text(blocks: Sequence[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks if not block.text.startswith(BILLING_HEADER))


def _system_turn(message: InputMessage, where: str) -> Turn:
    texts = []
    for block, field in _blocks(message, where):
        if not isinstance(block, TextBlock):
            raise _misplaced(field, block, "system")
        texts.append(block)
    return Turn(role="system", content=_system_text(texts))


def _assistant_turn(message: InputMessage, where: str, names: dict[str, str]) -> Turn:
    text = thought = ""
    calls: list[Call] = []
    for block, field in _blocks(message, where):
        match block:
            case TextBlock():
                text += block.text
            case ThinkingBlock():
                thought += block.thinking
            case RedactedThinkingBlock():
                pass  # only who wrote it can read it
            case ToolUseBlock():
                if block.id in names:
                    raise InvalidRequest(f"{field}.id: {block.id!r} is there twice", field=f"{field}.id")
                names[block.id] = block.name
                calls.append(Call(block.id, block.name, block.input))
            case _:
                raise _misplaced(field, block, "assistant")
    # As templates expect it: no text at all, instead of an empty one, where there are but calls.
    return Turn(role="assistant", content=text or (None if calls else ""), thought=thought, calls=calls)


def _user_turns(message: InputMessage, where: str, names: dict[str, str]) -> list[Turn]:
    results: list[Turn] = []
    texts: list[str] = []
    for block, field in _blocks(message, where):
        match block:
            case TextBlock():
                texts.append(block.text)
            case ToolResultBlock():
                if texts:
                    raise InvalidRequest(f"{field}: results of tools come before the text", field=field)
                results.append(_result_turn(block, field, names))
            case _:
                raise _misplaced(field, block, "user")
    said = [Turn(role="user", content="\n".join(texts))] if texts or not results else []
    return [*results, *said]


def _result_turn(block: ToolResultBlock, where: str, names: dict[str, str]) -> Turn:
    name = names.get(block.tool_use_id)
    if name is None:
        field = f"{where}.tool_use_id"
        raise InvalidRequest(f"{field}: no call before it has the id {block.tool_use_id[:64]!r}", field=field)
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(each.text for each in content)
    if block.is_error:
        text = FAILED + text
    return Turn(role="tool", content=text, name=name, tool_call_id=block.tool_use_id)


def _blocks(message: InputMessage, where: str) -> list[tuple[Block, str]]:
    """With the name of each one's place."""
    if isinstance(message.content, str):
        return [(TextBlock(message.content), where)]
    return [(block, f"{where}[{at}]") for at, block in enumerate(message.content)]


def _misplaced(where: str, block: Block, role: str) -> InvalidRequest:
    kind = block.__struct_config__.tag
    return InvalidRequest(f"{where}: {kind} is no block of the {role}'s", field=where)
