"""A reader that takes snapshot and deltas has at each moment what there is, also when it comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.gateway.view.feed import KEPT_DELTAS, MAX_ENDED, Feed, Look
from tests.support.examples import examples
from tests.support.gateway.view_forms import engine_form, health_form, request_form

pytestmark = pytest.mark.quick


def look(at: float, loads: dict[str, int], num_ended: int, running: list[str] | None = None) -> Look:
    return Look(
        at=at,
        index_alive=True,
        control_version=1,
        engines=[engine_form(name, running=load) for name, load in loads.items()],
        running=[request_form(name) for name in running or []],
        num_running=len(running or []),
        num_ended=num_ended,
        health=health_form(at),
    )


class Reader:
    """As the page: what it knows after what it has read."""

    def __init__(self) -> None:
        self.last_id = ""
        self.loads: dict[str, int] = {}
        self.ended: list[str] = []
        self.running: list[str] = []

    def read(self, events: bytes) -> None:
        for event in filter(None, events.decode().split("\n\n")):
            name, data = event.split("\n")
            self.last_id = name.removeprefix("id: ")
            self.take(json.loads(data.removeprefix("data: ")))

    def take(self, message: dict[str, Any]) -> None:
        if message["type"] == "snapshot":
            self.loads, self.ended, self.running = {}, [], []
        for gone in message.get("gone", []):
            del self.loads[gone]
        self.loads |= {each["id"]: each["load"]["running"] for each in message.get("engines", [])}
        self.ended += [each["id"] for each in message.get("ended", [])]
        if message.get("running") is not None:
            self.running = [each["id"] for each in message["running"]]


LOADS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 2))


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(st.tuples(LOADS, st.integers(0, 3), st.booleans()), min_size=1, max_size=10))
def test_deltas_make_of_the_snapshot_what_there_is(moments: list[tuple[dict[str, int], int, bool]]) -> None:
    feed, reader, names, seen = Feed("life"), Reader(), list[str](), 0
    for number, (loads, num_new, stays) in enumerate(moments):
        new = [f"r{number}.{each}" for each in range(num_new)]
        names += new
        running = [f"x{number}"] if stays else []
        feed.look(look(float(number), loads, len(names), running), [request_form(each) for each in new])
        resumed = feed.resumed(reader.last_id)
        if resumed is None:
            reader.read(feed.snapshot([request_form(each) for each in names], feed.base))
        elif stays:  # else it is away for a while
            reader.read(feed.since(resumed))
        else:
            continue
        seen = len(names)
        assert (reader.loads, reader.ended, reader.running) == (loads, names[:seen], running)


def test_a_look_while_a_snapshot_is_being_made_is_news_for_its_reader() -> None:
    feed, reader = Feed("life"), Reader()
    feed.look(look(0.0, {"a": 1, "b": 1}, 1), [request_form("r0")])
    base = feed.base
    ended = [request_form("r0")]  # asked for in a thread, and of siblings
    feed.look(look(1.0, {"a": 2}, 2), [request_form("r1")])
    reader.read(feed.snapshot(ended, base))
    resumed = feed.resumed(reader.last_id)
    assert resumed == base[0]
    reader.read(feed.since(resumed))
    assert (reader.loads, reader.ended) == ({"a": 2}, ["r0", "r1"])


def test_who_was_away_for_too_long_or_comes_from_another_life_gets_a_snapshot() -> None:
    feed = Feed("life")
    for number in range(KEPT_DELTAS + 5):
        feed.look(look(float(number), {"a": number % 2}, 0), [])
    assert feed.resumed(f"life-{feed.number}") == feed.number
    assert feed.resumed(f"life-{feed.number - KEPT_DELTAS}") is not None
    for stale in ("life-1", f"other-{feed.number}", f"life-{feed.number + 1}", "life-", "", "life-٣", "-"):
        assert feed.resumed(stale) is None, stale
    feed.rest()
    assert feed.resumed(f"life-{feed.number - 1}") is None


def test_what_does_not_change_is_not_told() -> None:
    feed = Feed("life")
    feed.look(look(1.0, {"a": 1}, 0), [])
    feed.look(look(2.0, {"a": 1}, 0), [])
    [line] = [line for line in feed.since(1).decode().splitlines() if line.startswith("data: ")]
    assert json.loads(line.removeprefix("data: ")) == {
        "type": "delta",
        "at": 2.0,
        "index_alive": True,
        "control_version": 1,
        "num_running": 0,
    }


def test_more_than_one_delta_can_tell_is_counted() -> None:
    feed = Feed("life")
    feed.look(look(1.0, {}, 0), [])
    many = [request_form(str(number)) for number in range(MAX_ENDED + 7)]
    feed.look(look(2.0, {}, len(many)), many)
    [line] = [line for line in feed.since(1).decode().splitlines() if line.startswith("data: ")]
    told = json.loads(line.removeprefix("data: "))
    assert (len(told["ended"]), told["num_skipped"], told["ended"][-1]["id"]) == (MAX_ENDED, 7, many[-1].id)
