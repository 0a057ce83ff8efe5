"""Items -> turns of a conversation: messages, thoughts, calls and their results. Pure.

Owns which kinds of items there are, and which of them are one turn: what the assistant has thought, said and
called in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

from microserve.gateway.api.arguments import arguments_of
from microserve.gateway.request.request import Call, Role, Turn
from microserve.gateway.responses.schema import Content, InputItem, ItemPart
from microserve.gateway.responses.thought import opened
from microserve.protocol.errors import InvalidRequest

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class Turns:
    """``add`` items in their order; ``turns`` is what there is of them."""

    def __init__(self, instructions: str | None = None) -> None:
        self.turns: list[Turn] = []
        self._open: Turn | None = None
        """The assistant's, as long as nobody else has had a turn."""
        self._called: dict[str, str] = {}
        """Names of functions by the call's id."""
        if instructions:
            self._append(Turn(role="system", content=instructions))

    def add(self, item: InputItem, where: str) -> None:
        """Raises :class:`InvalidRequest` naming the field, which is within ``where``."""
        match item.type:
            case None | "message":
                self._message(item, where)
            case "reasoning":
                self._think(_thought(item, where))
            case "function_call":
                self._call(item, where)
            case "function_call_output":
                self._result(item, where)
            case "item_reference":
                field = f"{where}.id"
                name = _given(item.id, field)
                raise InvalidRequest(f"{field}: there is no item {name[:128]!r}", field=field)
            case kind:
                raise InvalidRequest(
                    f"{where}.type {kind[:64]!r} is not supported: message, function_call, "
                    "function_call_output, reasoning and item_reference are",
                    field=f"{where}.type",
                )

    def _think(self, thought: str) -> None:
        """Behind a text and no call, it is of another turn."""
        if thought and self._open is not None and self._open.content is not None and not self._open.calls:
            self._open = None
        turn = self._assistant()
        turn.thought = _joined(turn.thought, thought)

    def _message(self, item: InputItem, where: str) -> None:
        role = ROLES.get(_given(item.role, f"{where}.role"))
        if role is None:
            raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}", field=f"{where}.role")
        if item.content is None:
            raise InvalidRequest(f"{where}.content is missing", field=f"{where}.content")
        text = _text_of(item.content, f"{where}.content")
        if role != "assistant":
            self._append(Turn(role=role, content=text))
            return
        turn = self._open
        if turn is not None and (turn.content is None or turn.calls):
            turn.content = (turn.content or "") + text
        else:
            self._open = self._append(Turn(role="assistant", content=text))

    def _call(self, item: InputItem, where: str) -> None:
        call_id, name = _given(item.call_id, f"{where}.call_id"), _given(item.name, f"{where}.name")
        field = f"{where}.arguments"
        arguments = arguments_of(_given(item.arguments, field), field)
        turn = self._assistant()
        turn.calls = [*turn.calls, Call(call_id, name, arguments)]
        self._called[call_id] = name

    def _result(self, item: InputItem, where: str) -> None:
        call_id = _given(item.call_id, f"{where}.call_id")
        if call_id not in self._called:
            field = f"{where}.call_id"
            raise InvalidRequest(f"{field}: there is no call {call_id[:128]!r} before it", field=field)
        if item.output is None:
            raise InvalidRequest(f"{where}.output is missing", field=f"{where}.output")
        text = _text_of(item.output, f"{where}.output")
        self._append(Turn(role="tool", content=text, tool_call_id=call_id, name=self._called[call_id]))

    def _assistant(self) -> Turn:
        if self._open is None:
            self._open = self._append(Turn(role="assistant", content=None))
        return self._open

    def _append(self, turn: Turn) -> Turn:
        """Whatever the system says before anybody else is one turn: many templates know of no other."""
        self._open = None
        if turn.role == "system" and len(self.turns) == 1 and self.turns[0].role == "system":
            self.turns[0].content = _joined(self.turns[0].content or "", turn.content or "")
            return self.turns[0]
        self.turns.append(turn)
        return turn

    def finished(self) -> list[Turn]:
        """A thought behind which nothing was said or called is a turn of no text."""
        for turn in self.turns:
            if turn.content is None and not turn.calls:
                turn.content = ""
        return self.turns


def _thought(item: InputItem, where: str) -> str:
    if item.content:
        return _text_of(item.content, f"{where}.content")
    if item.encrypted_content:
        thought = opened(item.encrypted_content)
        if thought is None:
            field = f"{where}.encrypted_content"
            raise InvalidRequest(f"{field} is none that was made here", field=field)
        return thought
    return _text_of(item.summary or [], f"{where}.summary")


def _text_of(content: Content, where: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_part(part, f"{where}[{at}]") for at, part in enumerate(content))


def _part(part: ItemPart, where: str) -> str:
    if part.type == "refusal":
        return _given(part.refusal, f"{where}.refusal")
    if part.type not in TEXTS:
        raise InvalidRequest(
            f"{where}.type {part.type[:64]!r} is not supported: only text is", field=f"{where}.type"
        )
    return _given(part.text, f"{where}.text")


def _given(value: str | None, field: str) -> str:
    if value is None:
        raise InvalidRequest(f"{field} is missing", field=field)
    return value


def _joined(before: str, text: str) -> str:
    return f"{before}\n\n{text}" if before and text else before or text


def turns_of(instructions: str | None, history: Sequence[InputItem], own: Sequence[InputItem]) -> list[Turn]:
    """``history``: of former responses. Raises :class:`InvalidRequest` naming the item."""
    turns = Turns(instructions)
    for at, item in enumerate(history):
        turns.add(item, f"previous_response_id[{at}]")
    for at, item in enumerate(own):
        turns.add(item, f"input[{at}]")
    return turns.finished()
