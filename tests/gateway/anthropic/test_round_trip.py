"""What a body asks for is in its request and nowhere else: a body written from a request asks for the same,
and so does the request that has gone through a helper's pipe."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from microserve.gateway.anthropic.request import NAMES, into_counted, into_request
from microserve.gateway.anthropic.schema import CountTokensRequest, MessagesRequest
from microserve.gateway.api.parse import parse
from microserve.gateway.grammar.asked import json_schema
from microserve.gateway.request.request import (
    Call,
    Conversation,
    GenerateRequest,
    SamplingWish,
    TemplateOption,
    ToolUse,
    Turn,
)
from tests.support.gateway.messages_bodies import messages_body

WORDS = st.text(alphabet="ab \nü", min_size=1, max_size=4)
VALUES = st.recursive(WORDS | st.integers(-(1 << 70), 1 << 70) | st.none(), st.lists, max_leaves=3)
OBJECTS = st.dictionaries(WORDS, VALUES, max_size=2)
THOUGHTS = st.just("") | WORDS


@st.composite
def turns(draw: st.DrawFn) -> list[Turn]:
    """As templates like them: calls are answered at once, and nobody speaks twice in a row."""
    found: list[Turn] = []
    if draw(st.booleans()):
        found.append(Turn(role="system", content=draw(WORDS)))
    number = 0
    for _ in range(draw(st.integers(0, 2))):
        found.append(Turn(role="user", content=draw(WORDS)))
        while count := draw(st.integers(0, 2)):
            calls = [Call(f"c{number + at}", "fg"[at], draw(OBJECTS)) for at in range(count)]
            number += count
            said = draw(st.none() | WORDS)
            found.append(Turn(role="assistant", content=said, thought=draw(THOUGHTS), calls=calls))
            for call in draw(st.permutations(calls)):
                found.append(Turn(role="tool", content=draw(WORDS), name=call.name, tool_call_id=call.id))
            if draw(st.booleans()):
                found.append(Turn(role="system", content=draw(WORDS)))
        found.append(Turn(role="assistant", content=draw(WORDS), thought=draw(THOUGHTS)))
    return [*found, *([Turn(role="user", content=draw(WORDS))] if not found or draw(st.booleans()) else [])]


@st.composite
def tool_uses(draw: st.DrawFn) -> ToolUse:
    names = draw(st.lists(st.sampled_from("fgh"), min_size=1, unique=True))
    optional = {"description": WORDS, "strict": st.just(True)}
    function = st.fixed_dictionaries({"parameters": OBJECTS}, optional=optional)
    shown = [{"type": "function", "function": {"name": name, **draw(function)}} for name in names]
    mode: Any = draw(st.sampled_from(["auto", "required", "named"]))
    return ToolUse(
        shown=shown,
        callable=names[:1] if mode == "named" else names,
        mode=mode,
        one_only=mode == "named" or draw(st.booleans()),
        schema_field="input_schema",
    )


@st.composite
def requests(draw: st.DrawFn) -> GenerateRequest:
    conversation = draw(turns().filter(lambda each: [turn.role for turn in each] != ["system"]))
    options: dict[str, TemplateOption] = {}
    thinks = draw(st.none() | st.booleans())
    if thinks is not None:
        options["enable_thinking"] = TemplateOption(thinks, "thinking", is_hint=True)
    if (effort := draw(st.none() | st.sampled_from(["low", "max"]))) is not None:
        options["reasoning_effort"] = TemplateOption(effort, "output_config.effort", is_hint=True)
    labels: dict[str, Any] = {}
    if (user := draw(st.none() | WORDS)) is not None:
        labels |= {"user": user, "metadata": {"user_id": user}}
    fields = st.sampled_from(["output_config.format", "output_format"])
    grammars = st.builds(lambda field, schema: json_schema(field, schema, is_strict=True), fields, OBJECTS)
    return GenerateRequest(
        model=draw(WORDS),
        prompt=Conversation(
            conversation, options, continues=conversation[-1].role == "assistant", folds_system=True
        ),
        sampling=SamplingWish(
            max_tokens=draw(st.integers(1, 99)),
            is_max_cut=True,
            temperature=draw(st.none() | st.floats(0, 2)),
            top_p=draw(st.none() | st.floats(0.1, 1)),
            top_k=draw(st.none() | st.integers(0, 9)),
        ),
        stop=draw(st.lists(WORDS, max_size=2)),
        stream=draw(st.booleans()),
        tools=draw(st.none() | tool_uses()),
        grammar=draw(st.none() | grammars),
        hides_thoughts=bool(thinks) and draw(st.booleans()),
        warnings=["thinking.budget_tokens is not enforced"] if thinks and draw(st.booleans()) else [],
        labels=labels,
        names=NAMES,
    )


@given(request=requests())
def test_a_body_written_from_a_request_asks_for_it(request: GenerateRequest) -> None:
    body = json.dumps(messages_body(request)).encode()
    found = into_request(parse(body, MessagesRequest))
    assert found == request
    assert msgspec.json.decode(msgspec.json.encode(found), type=GenerateRequest) == request


@given(request=requests())
def test_what_is_counted_is_what_would_be_computed(request: GenerateRequest) -> None:
    """Both endpoints make the same prompt of the same body, by the same tools."""
    body = messages_body(request)
    counted = into_counted(parse(json.dumps(body).encode(), CountTokensRequest))
    assert (counted.prompt, counted.tools) == (request.prompt, request.tools)
