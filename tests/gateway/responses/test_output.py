"""Whatever a model says, in whatever pieces: a client that adds up the events has the items of the answer
that is not streamed, with the same names; every item is added and done, also one of nothing."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microserve.gateway.api.format import Answering, Ending, FinishedChoice, UsageCounts
from microserve.gateway.http.errors import problem_of
from microserve.gateway.parsing.events import Arguments, CallBegun, Event, Said
from microserve.gateway.request.request import Conversation, GenerateRequest
from microserve.gateway.responses.format import ResponsesFormat
from microserve.gateway.responses.replies import ResponseReply
from microserve.gateway.responses.thought import opened
from microserve.gateway.text.answer.choice import Piece
from microserve.gateway.text.answer.transcript import TokenText
from microserve.protocol.errors import EngineLost
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.gateway.responses.test_asking import request as asked
from tests.support.gateway.responses_bodies import folded

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A machine may have other things to do."""

TEXTS = st.just("x") | st.text(max_size=4)
SAID = st.builds(Said, st.sampled_from(["content", "reasoning"]), TEXTS)
TOKENS = st.lists(st.builds(TokenText, TEXTS, st.binary(max_size=2), st.floats(-9, 0)), max_size=2)
COUNTS = UsageCounts(7, 5, 3, 2)


@st.composite
def read(draw: st.DrawFn) -> list[Piece]:
    """Pieces of an answer that is read: each call's arguments come behind its begin."""
    events: list[Event] = []
    num_calls = 0
    for _ in range(draw(st.integers(0, 8))):
        if draw(st.booleans()):
            events.append(draw(SAID))
            continue
        events.append(CallBegun(num_calls, f"call_{num_calls}", "f"))
        events += [Arguments(num_calls, text) for text in draw(st.lists(TEXTS, max_size=3))]
        num_calls += 1
    pieces = []
    while events:
        count = draw(st.integers(1, len(events)))
        pieces.append(Piece(events=events[:count], tokens=draw(TOKENS)))
        events = events[count:]
    return pieces


PLAIN = st.lists(st.builds(Piece, TEXTS, TOKENS), max_size=6)
PIECES = PLAIN | read()


def format_of(**fields: Any) -> ResponsesFormat:
    return ResponsesFormat(answering(asked(**fields)))


def answering(request: GenerateRequest) -> Answering:
    return Answering(
        request, SamplingParams(), unique_id="0123456789abcdef" * 2, created=1, model="m", fingerprint="f",
        num_prompt_tokens=7,
    )  # fmt: skip


def events_of(stream: bytes) -> list[dict[str, Any]]:
    events = []
    for event in stream.decode().removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def streamed(answer: ResponsesFormat, pieces: list[Piece], reason: str) -> list[dict[str, Any]]:
    parts = [answer.opening(0), *(answer.delta(0, piece) for piece in pieces)]
    parts += [answer.finish(0, Ending(reason, "cpu1")), answer.end(COUNTS)]
    events = events_of(b"".join(parts))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


@UNHURRIED
@given(pieces=PIECES, reason=st.sampled_from(["stop", "length", "tool_calls"]), encrypts=st.booleans())
def test_events_add_up_to_the_answer_that_is_not_streamed(
    pieces: list[Piece], reason: str, encrypts: bool
) -> None:
    include = ["reasoning.encrypted_content"] if encrypts else []
    created, in_progress, *events, last = streamed(format_of(include=include), pieces, reason)
    whole = FinishedChoice(0, "", [], Ending(reason, "cpu1"), pieces=pieces)
    reply = json.loads(format_of(include=include).reply([whole], COUNTS))
    assert folded(events) == reply["output"] == last["response"]["output"] != []
    assert last["type"] == f"response.{last['response']['status']}"
    assert {**last["response"], "completed_at": 0} == {**reply, "completed_at": 0}
    assert [created["type"], in_progress["type"]] == ["response.created", "response.in_progress"]
    assert created["response"] == in_progress["response"]
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    for response in (reply, created["response"]):
        msgspec.convert(response, ResponseReply)


@UNHURRIED
@given(pieces=PIECES)
def test_what_is_said_is_all_there(pieces: list[Piece]) -> None:
    last = streamed(format_of(include=["reasoning.encrypted_content"]), pieces, "stop")[-1]
    output = last["response"]["output"]
    said = [event for piece in pieces for event in (piece.events or [Said("content", piece.text)])]
    for kind, wanted in (("message", "content"), ("reasoning", "reasoning")):
        texts = [item["content"][0]["text"] for item in output if item["type"] == kind]
        assert "".join(texts) == "".join(
            event.text for event in said if isinstance(event, Said) and event.kind == wanted
        )
    calls = [item for item in output if item["type"] == "function_call"]
    assert [call["call_id"] for call in calls] == [each.id for each in said if isinstance(each, CallBegun)]
    for number, each in enumerate(calls):
        texts = [event.text for event in said if isinstance(event, Arguments) and event.index == number]
        assert each["arguments"] == "".join(texts)
    for item in output:
        if item["type"] == "reasoning":
            assert opened(item["encrypted_content"]) == item["content"][0]["text"]
    num_logprobs = sum(len(item["content"][0]["logprobs"]) for item in output if item["type"] == "message")
    of_text = [piece for piece in pieces if not piece.events or piece.events[-1] == Said("content", "x")]
    assert num_logprobs >= sum(len(piece.tokens) for piece in of_text)


def test_an_answer_of_nothing_is_a_message_of_no_text() -> None:
    kinds = [event["type"].removeprefix("response.") for event in streamed(format_of(), [], "stop")]
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip


def test_an_answer_that_was_cut_is_incomplete_and_so_is_its_last_item() -> None:
    pieces = [Piece(events=[Said("reasoning", "hm"), Said("content", "so")])]
    last = streamed(format_of(), pieces, "length")[-1]
    response = last["response"]
    assert last["type"] == "response.incomplete"
    assert (response["status"], response["completed_at"]) == ("incomplete", None)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]


@UNHURRIED
@given(pieces=PIECES, is_opened=st.booleans())
def test_a_stream_that_breaks_says_so_behind_its_beginning(pieces: list[Piece], is_opened: bool) -> None:
    answer = format_of()
    parts = [answer.opening(0), *(answer.delta(0, piece) for piece in pieces)] if is_opened else []
    parts.append(answer.failed(problem_of(EngineLost("e0 is gone"))))
    events = events_of(b"".join(parts))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    *_, error, failed = events
    assert (error["type"], error["message"]) == ("error", "e0 is gone")
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "e0 is gone"}
    msgspec.convert(failed["response"], ResponseReply)
    said = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
    parts_of = [
        item.get("content", [{"text": item.get("arguments")}]) for item in failed["response"]["output"]
    ]
    assert "".join(part["text"] for content in parts_of for part in content) == said
    assert all(item["status"] != "in_progress" for item in failed["response"]["output"])
    assert failed["response"]["store"] is False


def test_a_response_tells_the_request_again() -> None:
    tools = [{"type": "function", "name": "f", "strict": True}]
    fields: dict[str, Any] = {
        "instructions": "i", "tools": tools, "tool_choice": {"type": "function", "name": "f"},
        "metadata": {"a": "b"}, "max_output_tokens": 9, "user": "u", "safety_identifier": "s",
        "prompt_cache_key": "k", "parallel_tool_calls": False, "top_logprobs": 2,
        "reasoning": {"effort": "low"}, "text": {"verbosity": "low"},
    }  # fmt: skip
    whole = FinishedChoice(0, "", [], Ending("stop", "cpu1"))
    reply = json.loads(format_of(**fields).reply([whole], COUNTS))
    fields["tools"] = [{**tools[0], "description": None, "parameters": None}]
    fields["reasoning"] = {"effort": "low", "summary": None}
    fields["text"] = {"verbosity": "low", "format": {"type": "text"}}
    assert {name: reply[name] for name in fields} == fields
    assert reply["usage"] == {
        "input_tokens": 7, "output_tokens": 5, "total_tokens": 12,
        "input_tokens_details": {"cached_tokens": 3}, "output_tokens_details": {"reasoning_tokens": 2},
    }  # fmt: skip


def test_prompts_of_a_format_need_not_be_there() -> None:
    """A helper has read the body: the request comes without its turns."""
    request = asked()
    request.drop_prompt()
    assert request.prompt == Conversation([])
    assert ResponsesFormat(answering(request)).opening(0)
