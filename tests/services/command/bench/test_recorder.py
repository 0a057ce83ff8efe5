"""One answer: which instants count, and what is a failure."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.services.command.bench.recorder import Recorder
from microserve.services.command.bench.report import e2el_s, tpot_s, ttft_s
from microserve.services.command.bench.task import Outcome


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def sse(data: Any) -> bytes:
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


def text(content: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]}


def usage(prompt: int, output: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}}


def recorder(clock: Clock, **kwargs: Any) -> Recorder:
    return Recorder(Outcome(0, 100.0, 100.0), clock, **{"max_tokens": 50, "exact_output": False, **kwargs})


def record(*events: Any, status: int = 200, fault: str = "", **kwargs: Any) -> Outcome:
    clock = Clock()
    listener = recorder(clock, **kwargs)
    listener.head(status, {})
    for each in events:
        listener.body(each if isinstance(each, bytes) else sse(each))
    listener.end(fault)
    return listener.outcome


@given(gaps=st.lists(st.floats(0.001, 2.0), min_size=1, max_size=30), data=st.data())
def test_the_arithmetic(gaps: list[float], data: st.DataObject) -> None:
    """Tokens at known instants: the figures are those, however many of them a network packet holds."""
    clock = Clock()
    listener = recorder(clock)
    listener.head(200, {"x-microserve-engines": "e0,e1", "x-microserve-strategy": "auto"})
    listener.body(sse({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
    instants = []
    for gap in gaps:
        clock.now_s += gap
        instants.append(clock.now_s)
        written = sse(text("x"))
        cut = data.draw(st.integers(0, len(written) - 1))
        listener.body(written[:cut])
        listener.body(written[cut:])
    clock.now_s += 0.5
    listener.body(sse(text("", "stop")))
    end_s = clock.now_s
    clock.now_s += 9.0
    listener.body(sse(usage(11, len(gaps))) + sse("[DONE]"))
    listener.end("")
    outcome = listener.outcome
    assert outcome.fault == ""
    assert ttft_s(outcome) == pytest.approx(gaps[0])
    assert outcome.gaps_s == pytest.approx(gaps[1:])
    assert e2el_s(outcome) == pytest.approx(end_s - 100.0), "usage is no token"
    assert (outcome.input_tokens, outcome.output_tokens) == (11, len(gaps))
    tpot = tpot_s(outcome)
    assert tpot is None if len(gaps) == 1 else tpot == pytest.approx((end_s - instants[0]) / (len(gaps) - 1))
    assert (outcome.engines, outcome.strategy) == ("e0,e1", "auto")


GOOD = (text("a"), text("b", "length"), usage(3, 2), "[DONE]")


@pytest.mark.parametrize(
    ("events", "options", "kind"),
    [
        (GOOD, {}, ""),
        (GOOD, {"max_tokens": 2, "exact_output": True, "expected_input": 3}, ""),
        ((text(""), text("", "length"), usage(3, 2), "[DONE]"), {}, ""),
        (({"choices": [{"index": 0, "text": "a"}]}, usage(3, 1), "[DONE]"), {}, ""),
        (({"choices": [{"index": 0, "delta": {"reasoning": "a"}}]}, usage(3, 1), "[DONE]"), {}, ""),
        (GOOD, {"max_tokens": 1}, "wrong count"),
        (GOOD, {"max_tokens": 3, "exact_output": True}, "wrong count"),
        (GOOD, {"expected_input": 4}, "wrong count"),
        ((text("a"), "[DONE]"), {}, "no usage"),
        ((usage(3, 0), "[DONE]"), {}, "empty answer"),
        (("[DONE]",), {}, "no usage"),
        ((), {}, "cut off"),
        ((text("a"), usage(3, 1)), {}, "cut off"),
        ((text("a"), {"error": {"message": "deadline"}}), {}, "error in the stream"),
        ((b"data: {]\n\n",), {}, "not a chunk"),
        ((b"data: " + b"[" * 100_000 + b"\n\n",), {}, "not a chunk"),
        ((*GOOD[:3], b"data: [DO"), {}, "cut off"),
    ],
)
def test_what_is_a_failure(events: tuple[Any, ...], options: dict[str, Any], kind: str) -> None:
    assert record(*events, **options).fault == kind


def test_a_refusal_has_its_status_and_its_sentence() -> None:
    outcome = record(b'{"error": {"mess', b'age": "too many"}}', status=429)
    assert (outcome.fault, outcome.detail) == ("http 429", "too many")


def test_a_broken_connection() -> None:
    assert record(text("a"), fault="closed").fault == "cut off"
    clock = Clock()
    listener = recorder(clock)
    listener.end("cannot connect")
    assert (listener.outcome.fault, listener.outcome.detail) == ("connection", "cannot connect")


def test_patience_ends() -> None:
    listener = recorder(Clock())
    listener.give_up(3.0)
    assert (listener.outcome.fault, listener.outcome.detail) == ("timeout", "no end within 3 s")


def test_a_text_behind_usage_in_one_chunk() -> None:
    """vLLM with ``continuous_usage_stats`` counts in every chunk: the last count is the one."""
    chunks = [{**text("x"), "usage": {"prompt_tokens": 3, "completion_tokens": n}} for n in (1, 2, 3)]
    assert record(*chunks, "[DONE]").output_tokens == 3


@given(
    st.lists(st.binary(max_size=60) | st.sampled_from([sse(each) for each in GOOD]), max_size=8),
    st.integers(100, 599),
)
def test_whatever_comes_is_an_outcome(pieces: list[bytes], status: int) -> None:
    record(*pieces, status=status)
