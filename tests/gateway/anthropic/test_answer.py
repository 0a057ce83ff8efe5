"""Bytes of an answer, streamed and whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from microserve.gateway.anthropic.answer import MessageFormat
from microserve.gateway.anthropic.errors import messages_problem_of
from microserve.gateway.api.format import Answering, Ending, FinishedChoice, UsageCounts
from microserve.gateway.parsing.events import Arguments, CallBegun, Event, Said
from microserve.gateway.request.request import Conversation, GenerateRequest, SamplingWish
from microserve.gateway.text.answer.choice import Piece
from microserve.protocol.errors import EngineLost
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.gateway.anthropic_stream import events_of, message_of

REQUEST = GenerateRequest(model="m", prompt=Conversation([]), sampling=SamplingWish(max_tokens=20))
ANSWERING = Answering(
    request=REQUEST,
    sampling=SamplingParams(max_tokens=20),
    unique_id="1",
    created=0,
    model="m",
    fingerprint="f",
    num_prompt_tokens=9,
)
COUNTS = UsageCounts(9, 5, 8, reasoning_tokens=2)
EVENTS: list[Event] = [
    Said("reasoning", "hm"),
    Said("content", "Grüße, \n"),
    Said("content", '"a"'),
    CallBegun(0, "call_1", "f"),
    Arguments(0, '{"city": "Zürich"}'),
]
GOLDEN = """\
event: message_start
data: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"m",\
"content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":9,\
"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":0}}}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":\
{"type":"thinking","thinking":"","signature":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"hm"}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":""}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: content_block_start
data: {"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"Grüße, \\n"}}

event: content_block_delta
data: {"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"\\"a\\""}}

event: ping
data: {"type":"ping"}

event: content_block_stop
data: {"type":"content_block_stop","index":1}

event: content_block_start
data: {"type":"content_block_start","index":2,"content_block":\
{"type":"tool_use","id":"call_1","name":"f","input":{}}}

event: content_block_delta
data: {"type":"content_block_delta","index":2,"delta":\
{"type":"input_json_delta","partial_json":"{\\"city\\": \\"Zürich\\"}"}}

event: content_block_stop
data: {"type":"content_block_stop","index":2}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},\
"usage":{"input_tokens":1,\
"cache_creation_input_tokens":0,"cache_read_input_tokens":8,"output_tokens":5,\
"output_tokens_details":{"thinking_tokens":2}},"microserve":{"exact":"none"}}

event: message_stop
data: {"type":"message_stop"}

"""
WHOLE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [
        {"type": "thinking", "signature": "", "thinking": "hm"},
        {"type": "text", "text": 'Grüße, \n"a"'},
        {"type": "tool_use", "id": "call_1", "name": "f", "input": {"city": "Zürich"}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 1,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 8,
        "output_tokens": 5,
        "output_tokens_details": {"thinking_tokens": 2},
    },
}


def streamed(pieces: Sequence[Piece], ending: Ending, answering: Answering = ANSWERING) -> bytes:
    answer = MessageFormat(answering)
    parts = [answer.opening(0), *(answer.delta(0, piece) for piece in pieces)]
    return b"".join([*parts, answer.finish(0, ending), answer.end(COUNTS)])


def whole(
    events: list[Event] | None, ending: Ending, answering: Answering = ANSWERING, text: str = ""
) -> Any:
    choice = FinishedChoice(0, text, [], ending, events)
    return json.loads(MessageFormat(answering).reply([choice], COUNTS))


def test_the_bytes_of_a_stream() -> None:
    answer = MessageFormat(ANSWERING)
    parts = [
        answer.opening(0),
        *(answer.delta(0, Piece(events=[event])) for event in EVENTS[:3]),
        answer.ping(),
        answer.delta(0, Piece(events=EVENTS[3:])),
        answer.finish(0, Ending("tool_calls", "none")),
        answer.end(COUNTS),
    ]
    assert b"".join(parts).decode() == GOLDEN
    message = message_of(GOLDEN.encode())
    assert message == WHOLE == whole(EVENTS, Ending("tool_calls", "none"))


def test_a_message_begins_before_anybody_is_pinged() -> None:
    answer = MessageFormat(ANSWERING)
    data = answer.ping() + answer.ping() + answer.opening(0)
    assert [each["type"] for each in events_of(data)] == ["message_start", "ping", "ping"]


def test_plain_text() -> None:
    ending = Ending("stop", "none")
    data = streamed([Piece(text="Grü"), Piece(), Piece(text="ße")], ending)
    assert message_of(data)["content"] == [{"type": "text", "text": "Grüße"}]
    assert message_of(data) == whole(None, ending, text="Grüße")


CALLED: list[Event] = [CallBegun(0, "c", "f"), Arguments(0, "{}")]
REASONS: list[tuple[list[Event], Ending, str, str | None]] = [
    ([Said("content", "x")], Ending("stop", "none"), "end_turn", None),
    ([Said("content", "x")], Ending("length", "none"), "max_tokens", None),
    ([Said("content", "x")], Ending("stop", "none", stop="\n\n"), "stop_sequence", "\n\n"),
    (CALLED, Ending("tool_calls", "none"), "tool_use", None),
    (CALLED, Ending("stop", "none"), "tool_use", None),  # of a tool that the client has named
    (CALLED, Ending("length", "none"), "max_tokens", None),
    ([], Ending("stop", "none"), "end_turn", None),
]


@pytest.mark.parametrize(("events", "ending", "reason", "sequence"), REASONS)
def test_why_it_ended(events: list[Event], ending: Ending, reason: str, sequence: str | None) -> None:
    message = message_of(streamed([Piece(events=[event]) for event in events], ending))
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)
    assert message == whole(events, ending)


def test_what_the_context_has_cut_off_is_not_told_as_the_clients_own_bound() -> None:
    answering = replace(ANSWERING, sampling=SamplingParams(max_tokens=19))
    ending = Ending("length", "none")
    message = message_of(streamed([Piece(text="x")], ending, answering))
    assert message["stop_reason"] == "model_context_window_exceeded"
    assert message == whole(None, ending, answering, text="x")


def test_thoughts_that_nobody_wants_to_see() -> None:
    answering = replace(
        ANSWERING, request=GenerateRequest(model="m", prompt=Conversation([]), hides_thoughts=True)
    )
    ending = Ending("tool_calls", "none")
    message = message_of(streamed([Piece(events=EVENTS)], ending, answering))
    assert message["content"][0] == {"type": "thinking", "thinking": "", "signature": ""}
    assert message == whole(EVENTS, ending, answering)


def test_a_stream_that_fails_says_so_and_has_no_end() -> None:
    data = MessageFormat(ANSWERING).failed(messages_problem_of(EngineLost("e1 is gone")))
    [event] = events_of(data)
    error = {"type": "api_error", "message": "e1 is gone", "param": None, "code": "engine_lost"}
    assert event == {"type": "error", "error": error}
