"""Fields that nobody knows: found wherever they stand, told briefly, and never mistaken for known ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.gateway.api.parse import parse, parsed
from microserve.gateway.api.unknown import MAX_NAME_CHARS, MAX_TOLD, strict, told
from microserve.gateway.helper.helper import INLINE_BODY_NBYTES
from microserve.gateway.openai.schema import ChatRequest, CompletionRequest
from microserve.protocol.errors import InvalidRequest
from tests.support.gateway.gateway_world import gateway_world, run

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
SAID = "ignored, for nobody knows them"


def ignored(**fields: Any) -> list[str]:
    return parsed(json.dumps(CHAT | fields).encode(), ChatRequest).ignored


def message(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": "hi"} | fields


@pytest.mark.parametrize(
    ("fields", "places"),
    [
        ({}, []),
        ({"colour": "blue", "temperature": 1}, ["colour"]),
        ({"messages": [message(mood=1), message(mood=2)]}, ["messages[].mood"]),
        (
            {"messages": [message(content=[{"type": "text", "text": "a", "cache_control": {}}])]},
            ["messages[].content[].cache_control"],
        ),
        ({"stream": True, "stream_options": {"chunk": 1}}, ["stream_options.chunk"]),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f", "how": 1}}},
            ["tool_choice.function.how"],
        ),
        ({"a\r\nset-cookie: x": 1}, ["a??set-cookie: x"]),
        ({"é\u2028": 1}, ["??"]),
        ({"x" * 1000: 1}, ["x" * MAX_NAME_CHARS]),
        ({f"x{i}": 1 for i in range(50)}, [*(f"x{i}" for i in range(MAX_TOLD)), "..."]),
        # What a template reads is not ours to know.
        ({"tools": [{"type": "function", "function": {"name": "f", "more": 1}, "x": 2}]}, []),
        ({"chat_template_kwargs": {"anything": 1}}, []),
    ],
)
def test_where_they_stand(fields: dict[str, Any], places: list[str]) -> None:
    assert ignored(**fields) == places


NAMES = sorted(ChatRequest.__struct_fields__)


@given(
    fields=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), st.none(), max_size=12),
    deep=st.dictionaries(
        st.sampled_from(["name", "role"]) | st.text(max_size=4), st.just("user"), max_size=4
    ),
)
def test_they_are_exactly_those_that_the_types_do_not_have(
    fields: dict[str, None], deep: dict[str, str]
) -> None:
    body = json.dumps(fields | CHAT | {"messages": [message(**deep)]}).encode()
    known = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"}
    try:
        places = parsed(body, ChatRequest).ignored
    except InvalidRequest:
        return
    plain = {name for name in fields if name.isascii() and name.isprintable() and name not in NAMES}
    if len(places) <= MAX_TOLD:
        assert plain <= set(places)
        assert {f"messages[].{name}" for name in deep if name.isalnum() and name.isascii()} - {
            f"messages[].{name}" for name in known
        } <= set(places)
    assert not any(name in places for name in NAMES)


def test_a_refused_field_stays_refused_beside_an_unknown_one() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ignored(colour=1, prompt_embeds="x")
    assert caught.value.field == "prompt_embeds"
    with pytest.raises(InvalidRequest):
        parse(json.dumps(CHAT | {"colour": 1, "n": "many"}).encode(), ChatRequest)


class Cat(msgspec.Struct, tag="cat", tag_field="type"):
    name: str


class Dog(msgspec.Struct, tag="dog", tag_field="type"):
    name: str
    friends: list[Cat | None] = []


class House(msgspec.Struct):
    pets: list[Cat | Dog]
    keeper: Cat | None = None
    rooms: dict[str, int] = msgspec.field(default_factory=dict)


def test_unions_by_their_tags() -> None:
    body = json.dumps(
        {
            "pets": [
                {"type": "cat", "name": "a", "friends": []},
                {"type": "dog", "name": "b", "friends": [None, {"type": "cat", "name": "c", "age": 1}]},
            ],
            "rooms": {"any": 1},
        }
    ).encode()
    house = msgspec.json.decode(body, type=House)
    assert told(body, House) == ["pets[].friends", "pets[].friends[].age"]
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(body, type=strict(House))
    clean = msgspec.json.encode(house)
    again = msgspec.json.decode(clean, type=strict(House))
    assert isinstance(again.pets[0], Cat) and isinstance(again.pets[1], Dog)
    assert msgspec.to_builtins(again) == msgspec.to_builtins(house) and told(clean, House) == []


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_a_type_that_refuses_them_is_made_once(kind: type[msgspec.Struct]) -> None:
    assert strict(kind) is strict(kind) and issubclass(strict(kind), kind)


def test_a_client_is_told_in_a_header_of_whichever_path(model: Path) -> None:
    """One header, however large the body is that a helper reads, and nothing in it that ends a line."""

    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = lambda served: served.send([65], ended=served.ended())
            async with httpx.AsyncClient(base_url=world.address, timeout=60.0) as http:
                for path, fields in (
                    ("/v1/chat/completions", CHAT),
                    ("/v1/chat/completions", CHAT | {"stream": True}),
                    ("/v1/completions", {"prompt": "x"}),
                    ("/tokenize", {"prompt": "x"}),
                    ("/detokenize", {"tokens": [65]}),
                ):
                    for padding in ("", "x" * INLINE_BODY_NBYTES):
                        body = {**fields, "model": "tiny", "a\r\nb": padding, "mood": 1}
                        reply = await http.post(path, json=body)
                        told = reply.headers.get_list("x-microserve-warning")
                        assert (reply.status_code, told) == (200, [f"{SAID}: a??b, mood"])
                    reply = await http.post(path, json={**fields, "model": "tiny"})
                    assert "x-microserve-warning" not in reply.headers

    run(main())


def test_a_type_is_looked_at_once_however_many_of_it_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a body of 60 kB holds the gateway's loop up for half a second."""
    asked: list[type[msgspec.Struct]] = []
    fields = msgspec.structs.fields

    def counted(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
        asked.append(kind)
        return fields(kind)

    monkeypatch.setattr(msgspec.structs, "fields", counted)
    assert ignored(messages=[message(mood=1)] * 1000) == ["messages[].mood"]
    assert len(asked) == len(set(asked))
