"""Blocks of an answer: whatever comes, however it is cut, a stream adds up to the whole message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from microserve.gateway.anthropic.blocks import BlockStream, encode, whole_blocks
from microserve.gateway.parsing.events import Arguments, CallBegun, Event, Said
from tests.support.gateway.anthropic_stream import added_up, events_of

TEXT = st.text(alphabet='ab "\\\n\u2028é😀', max_size=5)
SAID = st.builds(Said, st.sampled_from(["content", "reasoning"]), TEXT)
VALUES = st.dictionaries(
    TEXT, st.recursive(TEXT | st.integers() | st.none(), st.lists, max_leaves=3), max_size=2
)


@st.composite
def answers(draw: st.DrawFn) -> list[Event]:
    """As a reader tells them: the arguments of a call come behind its begin, in any number of parts."""
    found: list[Event] = []
    number = 0
    for what in draw(st.lists(SAID | VALUES, max_size=6)):
        if isinstance(what, Said):
            found.append(what)
            continue
        found.append(CallBegun(number, f"call_{number}", "fg"[number % 2]))
        written = json.dumps(what, ensure_ascii=False)
        cut = draw(st.integers(0, len(written)))
        found += [Arguments(number, part) for part in (written[:cut], written[cut:]) if part]
        number += 1
    return found


def streamed(events: Sequence[Event], cuts: Sequence[int], *, shows_thoughts: bool = True) -> bytes:
    """With the events of each wake-up together."""
    blocks = BlockStream(shows_thoughts=shows_thoughts)
    bounds = [0, *sorted({min(cut, len(events)) for cut in cuts}), len(events)]
    parts = [blocks.push(events[begin:end]) for begin, end in pairwise(bounds)]
    return b"".join([*parts, blocks.close(), blocks.close()])


@given(events=answers(), cuts=st.lists(st.integers(0, 12), max_size=4), shows_thoughts=st.booleans())
def test_a_stream_adds_up_to_the_whole(events: list[Event], cuts: list[int], shows_thoughts: bool) -> None:
    whole = json.loads(encode(whole_blocks(events, shows_thoughts=shows_thoughts)))
    data = streamed(events, cuts, shows_thoughts=shows_thoughts)
    assert added_up(data) == whole
    assert data == streamed(events, [], shows_thoughts=shows_thoughts)


@given(events=answers())
def test_thoughts_text_and_calls_are_never_in_each_others_blocks(events: list[Event]) -> None:
    said: dict[str, str] = {"text": "", "thinking": ""}
    calls = []
    for block in whole_blocks(events):
        if block["type"] == "tool_use":
            calls.append((block["id"], block["name"]))
        else:
            said[block["type"]] += block[block["type"]]
            assert block[block["type"]], "an empty block says nothing"
    kinds = {"text": "content", "thinking": "reasoning"}
    for block_kind, kind in kinds.items():
        assert said[block_kind] == "".join(e.text for e in events if isinstance(e, Said) and e.kind == kind)
    assert calls == [(each.id, each.name) for each in events if isinstance(each, CallBegun)]


def test_one_block_is_open_at_a_time_and_numbers_rise() -> None:
    events: list[Event] = [
        Said("reasoning", "hm"), Said("content", "a"), Said("content", "b"),
        CallBegun(0, "c0", "f"), Arguments(0, "{}"), CallBegun(1, "c1", "g"), Arguments(1, '{"a":1}'),
        Said("content", "c"),
    ]  # fmt: skip
    shape = [
        (each["type"].removeprefix("content_block_"), each["index"])
        for each in events_of(streamed(events, []))
    ]
    assert shape == [
        *[("start", 0), ("delta", 0), ("delta", 0), ("stop", 0)],  # what was thought, and its signature
        *[("start", 1), ("delta", 1), ("delta", 1), ("stop", 1)],
        *[("start", 2), ("delta", 2), ("stop", 2)],
        *[("start", 3), ("delta", 3), ("stop", 3)],
        *[("start", 4), ("delta", 4), ("stop", 4)],
    ]


def test_plain_text_is_one_block() -> None:
    blocks = BlockStream()
    data = blocks.say("Grü") + blocks.say("ß") + blocks.close()
    [block] = added_up(data)
    assert block == {"type": "text", "text": "Grüß"}


def test_an_answer_that_says_nothing_has_no_blocks() -> None:
    events: list[Event] = [Said("content", "")]
    assert (whole_blocks(events), streamed(events, [])) == ([], b"")
