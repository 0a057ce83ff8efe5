"""What is made of events: engines that come and go, rates of what has ended."""

from __future__ import annotations

import msgspec
import pytest

from microserve.gateway.view.feed import Feed, Look
from microserve.gateway.view.forms import EngineForm, RequestForm
from microserve.services.command.client.sse import EventReader
from microserve.services.command.top.picture import MAX_ENDED, Picture, check_light
from tests.support.gateway.view_forms import check_form, engine_form, health_form, request_form


def look(*engines: EngineForm, ended: int = 0, running: list[RequestForm] | None = None) -> Look:
    return Look(1.0, True, 1, engines, running or [], len(running or []), ended, health_form())


def events(feed: Feed, since: int) -> list[bytes]:
    return EventReader().push(feed.since(since))


def test_a_snapshot_and_deltas_make_what_the_gateway_sees() -> None:
    feed, picture = Feed("a"), Picture()
    feed.look(look(engine_form("e0", running=1), engine_form("e1")), [])
    [snapshot] = EventReader().push(feed.snapshot([request_form("r1", age_s=5.0)], feed.base))
    picture.take(snapshot, 100.0)
    assert [*picture.engines] == ["e0", "e1"]
    feed.look(
        look(engine_form("e0", running=7), ended=1, running=[request_form("r3", at=0.0)]),
        [request_form("r2", age_s=0.2)],
    )
    for event in events(feed, 1):
        picture.take(event, 101.0)
    assert [*picture.engines] == ["e0"]
    load = picture.engines["e0"].load
    assert load is not None and load.running == 7
    assert [form.id for form in picture.requests()] == ["r3", "r2", "r1"]


def test_rates_are_of_the_last_minute_and_count_what_was_only_counted() -> None:
    feed, picture = Feed("a"), Picture()
    feed.look(look(engine_form("e0", running=2, waiting=3, used_blocks=5, free_blocks=15)), [])
    old = request_form("old", age_s=300.0)
    new = request_form("new", age_s=1.0, prompt_tokens=100, cached_tokens=25, output_tokens=30)
    [snapshot] = EventReader().push(feed.snapshot([old, new], feed.base))
    picture.take(snapshot, 1000.0)
    summary = picture.summary(1000.0)
    assert (summary.requests_per_s, summary.tokens_per_s) == (1 / 60, 30 / 60)
    assert (summary.running, summary.waiting, summary.kv_usage, summary.hit_rate) == (2, 3, 0.25, 0.25)
    feed.look(look(engine_form("e0"), ended=5), [request_form("next", output_tokens=30)])
    for event in events(feed, 1):
        picture.take(event, 1000.0)
    summary = picture.summary(1000.0)
    assert summary.requests_per_s == pytest.approx(6 / 60)
    assert summary.tokens_per_s == pytest.approx(180 / 60)


def test_a_snapshot_that_left_some_out_says_no_more_than_it_has() -> None:
    feed, picture = Feed("a"), Picture()
    feed.look(look(), [])
    [snapshot] = EventReader().push(
        feed.snapshot(
            [request_form(f"r{number}", age_s=10.0 - number / 20) for number in range(200)], feed.base
        )
    )
    picture.take(snapshot, 50.0)
    assert picture.summary(50.0).requests_per_s == pytest.approx(20.0)


def test_no_more_is_kept_than_a_bound() -> None:
    feed, picture = Feed("a"), Picture()
    feed.look(look(), [])
    picture.take(EventReader().push(feed.snapshot([], feed.base))[0], 0.0)
    for number in range(30):
        feed.look(look(ended=200 * (number + 1)), [request_form("x")] * 200)
        for event in events(feed, number + 1):
            picture.take(event, float(number))
    assert len(picture.requests()) == MAX_ENDED


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(ValueError, match="type"):
        Picture().take(b'{"type": "other"}', 0.0)


def test_all_checks_together_are_one_word_and_the_age_of_the_newest() -> None:
    equal, other = check_form("a", "b", at=90.0), check_form("b", "a", at=60.0)
    unfinished = check_form("c", "a", at=99.0, outcome="unfinished")
    wrong = msgspec.structs.replace(other, outcome="differs")
    assert check_light(None, 100.0) == check_light(health_form(checks=[unfinished]), 100.0) == ""
    assert check_light(health_form(checks=[other, equal, unfinished]), 100.0) == "ok 10 s ago"
    assert check_light(health_form(checks=[equal, wrong]), 100.0) == "DIFFERS 10 s ago"
