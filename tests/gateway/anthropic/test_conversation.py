"""Messages of blocks become turns: which go together, what is left out, and what is no conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from microserve.gateway.anthropic.conversation import turns_of
from microserve.gateway.anthropic.schema import MessagesRequest
from microserve.gateway.api.parse import parse
from microserve.gateway.request.request import Call, Turn
from microserve.protocol.errors import InvalidRequest


def turns(*messages: dict[str, Any], system: Any = None) -> list[Turn]:
    body = {"model": "m", "max_tokens": 1, "messages": messages, "system": system}
    request = parse(json.dumps(body).encode(), MessagesRequest)
    return turns_of(request.system, request.messages)


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {**user(*content), "role": "assistant"}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def use(call_id: str, name: str = "f", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def result(call_id: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "x"}
REDACTED = {"type": "redacted_thinking", "data": "AAAA"}


def test_a_loop_of_tools() -> None:
    found = turns(
        user(text("one", **CACHED), text("two")),
        assistant(THOUGHT, REDACTED, text("Let me see."), use("a", city="Zürich"), use("b", "g")),
        user(
            result("b", "late", is_error=True),
            result("a", [text("4 °C"), text("wind", **CACHED)]),
            text("And now?"),
        ),
        system=[
            text("x-anthropic-billing-header: cc_version=1; cch=12ab;"),
            text("You are."),
            text("Be.", **CACHED),
        ],
    )
    assert found == [
        Turn(role="system", content="You are.\nBe."),
        Turn(role="user", content="one\ntwo"),
        Turn(
            role="assistant",
            content="Let me see.",
            thought="hm",
            calls=[Call("a", "f", {"city": "Zürich"}), Call("b", "g", {})],
        ),
        Turn(role="tool", content="Error: late", name="g", tool_call_id="b"),
        Turn(role="tool", content="4 °C\nwind", name="f", tool_call_id="a"),
        Turn(role="user", content="And now?"),
    ]


def test_a_call_alone_has_no_text_and_a_result_may_have_none() -> None:
    found = turns(user("go"), assistant(use("a")), user(result("a")))
    assert [each.content for each in found] == ["go", None, ""]


def test_one_role_in_a_row_is_one_turn() -> None:
    """Results are messages of their own, and instructions in between stay where they are."""
    found = turns(
        user("one"),
        user("two"),
        assistant(THOUGHT, text("three")),
        assistant(use("a")),
        {"role": "system", "content": "Be quick."},
        user(result("a", "x")),
        user("four"),
        system="You are.",
    )
    assert [(each.role, each.content) for each in found] == [
        ("system", "You are."),
        ("user", "one\ntwo"),
        ("assistant", "three"),
        ("system", "Be quick."),
        ("tool", "x"),
        ("user", "four"),
    ]
    assert (found[2].thought, found[2].calls) == ("hm", [Call("a", "f", {})])


ANSWERED = (user("x"), assistant(use("a")))


@pytest.mark.parametrize(
    ("messages", "field", "words"),
    [
        ((user({"type": "image", "source": {}}),), "messages[0].content[0].type", "'image' is not supported"),
        ((user({"type": "document"}),), "messages[0].content[0].type", "'document' is not supported"),
        ((user(text("x"), use("a")),), "messages[0].content[1]", "tool_use is no block of the user's"),
        ((user(THOUGHT),), "messages[0].content[0]", "thinking is no block of the user's"),
        ((user("x"), assistant(result("a"))), "messages[1].content[0]", "tool_result is no block"),
        (({"role": "system", "content": [THOUGHT]},), "messages[0].content[0]", "no block of the system's"),
        ((user(result("a")),), "messages[0].content[0].tool_use_id", "no call before it has the id 'a'"),
        ((*ANSWERED, user(text("x"), result("a"))), "messages[2].content[1]", "come before the text"),
        ((*ANSWERED, assistant(use("a"))), "messages[2].content[0].id", "'a' is there twice"),
        (
            (*ANSWERED, user(result("a", [{"type": "image"}]))),
            "messages[2].content[0].content[0].type",
            "'image' is not supported",
        ),
        (ANSWERED, "messages[1]", "the results of its calls are missing"),
        (({"role": "tool", "content": "x"},), "messages[0].role", "'tool' is not supported"),
        ((user({"type": "text"}),), "messages[0].content[0].text", "missing"),
        ((), "messages", "length >= 1"),
    ],
)
def test_what_is_no_conversation_is_named(messages: tuple[Any, ...], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        turns(*messages)
    assert (error.value.field, words in error.value.detail) == (field, True), error.value.detail
