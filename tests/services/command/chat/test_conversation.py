"""What was said: no sequence of questions, failures and undoing makes a history that no template takes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from microserve.protocol.errors import ConfigError
from microserve.services.command.chat.answer import STOPPED, Answer, Call
from microserve.services.command.chat.conversation import Conversation, Wishes, read_tools


def question(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


class Talks(RuleBasedStateMachine):
    """Beside a list of the exchanges that came to something."""

    def __init__(self) -> None:
        super().__init__()
        self.chat = Conversation(Wishes(model="m", system="brief"))
        self.exchanges: list[tuple[str, str]] = []
        self.failed: str | None = None

    @rule(text=st.text(), said=st.text(min_size=1), fault=st.sampled_from(["", STOPPED, "cut"]))
    def answer(self, text: str, said: str, fault: str) -> None:
        self.chat.answered(question(text), Answer(text=said, fault=fault))
        self.exchanges.append((text, said))
        self.failed = None

    @rule(text=st.text(), fault=st.sampled_from([STOPPED, "refused"]))
    def fail(self, text: str, fault: str) -> None:
        self.chat.answered(question(text), Answer(thought="hm", fault=fault))
        self.failed = text

    @rule(text=st.text(), said=st.text(min_size=1), results=st.lists(st.text(), min_size=1, max_size=3))
    def call(self, text: str, said: str, results: list[str]) -> None:
        calls = {at: Call(f"id{at}", "tool", "{}") for at in range(len(results))}
        self.chat.answered(question(text), Answer(calls=calls))
        for at, result in enumerate(results):
            self.chat.tool_result(f"id{at}", result)
        self.chat.answered(None, Answer(text=said))
        self.exchanges.append((text, said))
        self.failed = None

    @rule()
    def undo(self) -> None:
        taken = self.chat.undo()
        if self.failed is not None:
            expected: str | None = self.failed
            self.failed = None
        else:
            expected = self.exchanges.pop()[0] if self.exchanges else None
        assert (taken or {}).get("content") == expected

    @rule()
    def clear(self) -> None:
        self.chat.clear()
        self.exchanges, self.failed = [], None

    @rule()
    def save_and_load(self) -> None:
        other = Conversation(Wishes())
        other.load(self.chat.saved())
        assert (other.wishes, other.messages) == (self.chat.wishes, self.chat.messages)
        if self.failed is None:
            self.chat = other

    @invariant()
    def the_history_is_the_exchanges(self) -> None:
        messages = self.chat.body(question("next"))["messages"]
        assert messages[0] == {"role": "system", "content": "brief"}
        asked = [each["content"] for each in messages if each["role"] == "user"]
        assert asked == [*(text for text, _ in self.exchanges), "next"]
        said = [
            each["content"] for each in messages if each["role"] == "assistant" and not each.get("tool_calls")
        ]
        assert said == [text for _, text in self.exchanges]
        for before, message in itertools.pairwise(messages):
            assert message["role"] != "user" or before["role"] != "user", "no template takes two questions"


TestTalks = Talks.TestCase


def test_wishes_are_in_the_body_where_they_are_set() -> None:
    body = Conversation(Wishes(model="m")).body(question("q"))
    assert body.keys() == {"model", "messages", "stream", "stream_options"}
    tools = read_tools(b'[{"name": "now"}]')
    body = Conversation(Wishes(temperature=0.0, max_tokens=3, tools=tools)).body(question("q"))
    assert (body["temperature"], body["max_tokens"]) == (0.0, 3)
    assert body["tools"] == [{"type": "function", "function": {"name": "now"}}]


def test_tokens_add_up() -> None:
    chat = Conversation(Wishes())
    for _ in range(2):
        chat.answered(question("q"), Answer(text="a", num_prompt_tokens=10, num_answer_tokens=4))
    assert (chat.num_prompt_tokens, chat.num_answer_tokens, chat.num_all_tokens) == (10, 4, 28)


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b'{"wishes": {}, "messages": [{}]}', b'{"wishes": {"x": 1}, "messages": []}']
)
def test_what_is_no_chat_changes_none(text: bytes) -> None:
    chat = Conversation(Wishes(system="s"))
    with pytest.raises(ConfigError, match="not a saved chat"):
        chat.load(text)
    assert chat.wishes.system == "s"


@pytest.mark.parametrize("text", [b"{}", b"[1]", b'[{"type": "function"}]', b'[{"function": 3}]', b"["])
def test_what_is_no_tool(text: bytes) -> None:
    with pytest.raises(ConfigError):
        read_tools(text)
