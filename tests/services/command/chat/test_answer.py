"""An answer from its events: what is shown adds up to what is kept, whatever comes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.services.command.chat.answer import TEXT, THOUGHT, Answer, Call
from microserve.services.command.chat.screen import arguments_of, fault_of, figures_of

words = st.text(max_size=8)


def chunk(finish: str | None = None, **delta: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode()


def arguments(index: int, text: str, **more: Any) -> bytes:
    return chunk(tool_calls=[{"index": index, **more, "function": {"arguments": text}}])


@given(
    st.lists(st.tuples(st.sampled_from(["content", "reasoning", "reasoning_content"]), words), max_size=20)
)
def test_what_is_shown_is_what_is_kept(deltas: list[tuple[str, str]]) -> None:
    answer = Answer()
    shown = [piece for name, text in deltas for piece in answer.push(chunk(**{name: text}))]
    answer.push(b"[DONE]")
    answer.end("")
    assert answer.text == "".join(text for name, text in deltas if name == "content")
    assert "".join(piece.text for piece in shown if piece.kind == TEXT) == answer.text
    assert "".join(piece.text for piece in shown if piece.kind == THOUGHT) == answer.thought
    assert answer.fault == ""
    assert answer.message() == {"role": "assistant", "content": answer.text}


@given(st.lists(words, min_size=1, max_size=6), st.lists(words, min_size=1, max_size=6))
def test_calls_are_put_together(first: list[str], second: list[str]) -> None:
    answer = Answer()
    named = [{"index": at, "id": f"call_{at}", "function": {"name": name}} for at, name in enumerate("ab")]
    answer.push(chunk(tool_calls=named))
    for index, parts in ((0, first), (1, second)):
        for text in parts:
            answer.push(arguments(index, text))
    answer.push(chunk("tool_calls"))
    answer.push(b"[DONE]")
    answer.end("")
    assert [(each.id, each.name, each.arguments) for each in answer.calls.values()] == [
        ("call_0", "a", "".join(first)),
        ("call_1", "b", "".join(second)),
    ]
    assert [each["function"]["name"] for each in answer.message()["tool_calls"]] == ["a", "b"]


def test_a_call_that_is_cut_is_none() -> None:
    answer = Answer()
    answer.push(chunk(content="so: "))
    answer.push(arguments(0, '{"city": "Be', id="x"))
    answer.end("the connection was closed")
    assert not answer.calls and answer.has_anything
    assert fault_of(answer) == "the answer is cut off after 4 characters: the connection was closed"


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([b'{"error": {"message": "deadline exceeded"}}'], "deadline exceeded"),
        ([b"{"], "no part of an answer"),
        ([chunk(content="a")], "ended before the answer"),
    ],
)
def test_what_is_wrong_is_told(events: list[bytes], told: str) -> None:
    answer = Answer()
    for each in events:
        answer.push(each)
    answer.end("")
    assert told in answer.fault


@given(st.lists(st.binary(max_size=40), max_size=6), st.text(max_size=5))
def test_whatever_comes_is_an_answer(events: list[bytes], fault: str) -> None:
    answer = Answer()
    for each in events:
        answer.push(each)
    answer.end(fault)
    answer.message()


def test_figures() -> None:
    answer = Answer(text="x", num_prompt_tokens=41, num_answer_tokens=65, first_s=0.25, total_s=1.05)
    assert figures_of(answer) == "TTFT 0.25 s, 65 tokens at 80.0/s, prompt 41"
    answer.served_by = {"strategy": "auto", "strategy-version": "7", "engines": "e0,e1", "exact": "none"}
    assert figures_of(answer).endswith("prompt 41; auto 7 on e0,e1")
    assert figures_of(Answer(first_s=0.5)) == "TTFT 0.50 s"


@pytest.mark.parametrize(
    ("came", "shown"), [('{"a":[1]}', '{\n  "a": [\n    1\n  ]\n}'), ("", ""), ("{}", ""), ('{"a', '{"a')]
)
def test_arguments_are_laid_out(came: str, shown: str) -> None:
    assert arguments_of(Call("x", "f", came)) == shown
