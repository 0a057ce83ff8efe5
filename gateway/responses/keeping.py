"""What is kept of a response, and how a request goes on from it. Pure.

Owns the form of an entry: a response and all of the items that it was made of, those of former responses too,
so that one entry is enough to go on, whatever became of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from microserve.gateway.responses.ids import PREFIXES, input_id, is_response, response_of_item
from microserve.gateway.responses.schema import InputItem, ItemPart, ResponsesRequest
from microserve.protocol.errors import InvalidRequest

MAX_CONTEXT_NBYTES = 4 << 20
"""Of the items that a response was made of, as JSON: with more, it is not kept."""
MAX_REFERRED = 32
"""Responses whose items one request may refer to."""


class Entry(msgspec.Struct):
    input: list[InputItem]
    response: msgspec.Raw


class _Answered(msgspec.Struct):
    response: msgspec.Raw
    """What it was made of may be long, and is not looked at."""


class _Output(msgspec.Struct):
    id: str
    output: list[InputItem]


def context_of(items: Sequence[InputItem]) -> bytes:
    """As :func:`entry` takes it; empty for what is too large to be kept."""
    context = msgspec.json.encode(items)
    return context if len(context) <= MAX_CONTEXT_NBYTES else b""


def entry(context: bytes, response: bytes) -> bytes:
    """``context``: a JSON list of items."""
    return b'{"input":%b,"response":%b}' % (context, response)


def opened(data: bytes) -> tuple[list[InputItem], bytes]:
    """The items that a response was made of, each with a name, and the response's JSON."""
    found = msgspec.json.decode(data, type=Entry)
    unique = msgspec.json.decode(found.response, type=_Output).id.partition("_")[2]
    return [_named(item, unique, at) for at, item in enumerate(found.input)], bytes(found.response)


def response_of(data: bytes) -> bytes:
    """The JSON of an entry's response."""
    return bytes(msgspec.json.decode(data, type=_Answered).response)


def names_of(body: ResponsesRequest) -> Mapping[str, str]:
    """Of the responses that a body needs, with the field that says so."""
    found: dict[str, str] = {}
    if body.previous_response_id is not None:
        field = "previous_response_id"
        if not is_response(body.previous_response_id):
            raise InvalidRequest(f"{field} is no name of a response", field=field)
        found[body.previous_response_id] = field
    for at, item in enumerate([] if isinstance(body.input, str) else body.input or []):
        if item.type == "item_reference" and item.id is not None:
            name = response_of_item(item.id)
            if name is not None:
                found.setdefault(name, f"input[{at}].id")
    if len(found) > MAX_REFERRED:
        raise InvalidRequest(f"input refers to items of more than {MAX_REFERRED} responses", field="input")
    return found


def history_of(body: ResponsesRequest, kept: Mapping[str, bytes]) -> list[InputItem]:
    """All that was said up to the previous response, and that."""
    previous = body.previous_response_id
    return [] if previous is None else _whole(kept[previous])


def items_of(body: ResponsesRequest, kept: Mapping[str, bytes]) -> Sequence[InputItem]:
    """Of the body itself; a text is the user's message, a reference the item that it names."""
    if isinstance(body.input, str):
        return [InputItem(type="message", role="user", content=body.input)]
    items = body.input or []
    if not any(item.type == "item_reference" for item in items):
        return items
    known = {item.id: item for data in kept.values() for item in _whole(data)}
    return [known.get(item.id, item) if item.type == "item_reference" else item for item in items]


def _whole(data: bytes) -> list[InputItem]:
    items, response = opened(data)
    return [*items, *msgspec.json.decode(response, type=_Output).output]


def _named(item: InputItem, unique: str, at: int) -> InputItem:
    """As lists of items show them: a message's text is a part of it."""
    kind = item.type or "message"
    content = item.content
    if kind == "message" and isinstance(content, str):
        part = "output_text" if item.role == "assistant" else "input_text"
        content = [ItemPart(type=part, text=content)]
    name = item.id or (input_id(kind, unique, at) if kind in PREFIXES else None)
    return msgspec.structs.replace(
        item, type=kind, id=name, content=content, status=item.status or "completed"
    )


def page_of(data: bytes, *, newest_first: bool, after: str | None, limit: int) -> bytes:
    """Some of an entry's input items as JSON. Raises :class:`InvalidRequest` for an ``after`` that is none of
    them."""
    items, _ = opened(data)
    if newest_first:
        items.reverse()
    begin = 0
    if after is not None:
        begin = next((at + 1 for at, item in enumerate(items) if item.id == after), 0)
        if not begin:
            raise InvalidRequest(f"after: there is no item {after[:128]!r}", field="after")
    page = items[begin : begin + limit]
    return msgspec.json.encode(
        {
            "object": "list",
            "data": page,
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": begin + limit < len(items),
        }
    )
