"""What is remembered of requests: bounded, found by any of their names, in the order that was asked for."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.gateway.view import requests as remembered
from microserve.gateway.view.feed import Feed
from microserve.gateway.view.forms import RequestForm
from microserve.gateway.view.mesh import Mesh
from microserve.gateway.view.query import MAX_LIMIT, ORDERS, Query, query_of
from microserve.gateway.view.requests import KEPT_S, Kept, Requests, timeline
from microserve.gateway.view.view import View
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.strategy.decisions import Attempt, SendSeen
from tests.support.examples import examples
from tests.support.gateway.view_forms import request_form

pytestmark = pytest.mark.quick


@dataclass
class Model:
    """What should be there: times and forms, the oldest first."""

    max_requests: int
    kept: list[tuple[float, str]]

    def expire(self, now: float) -> None:
        self.kept = [(at, name) for at, name in self.kept if now - at <= KEPT_S][-self.max_requests :]


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(1, 5), st.lists(st.floats(0.0, 500.0), max_size=12))
def test_the_last_ones_are_kept_by_number_and_age(max_requests: int, pauses: list[float]) -> None:
    requests, model, now = Requests(max_requests), Model(max_requests, []), 0.0
    for number, pause in enumerate(pauses):
        now += pause
        requests.add(request_form(f"r{number}"), now)
        model.kept.append((now, f"r{number}"))
        model.expire(now)
        assert [form.id for form in requests.newest_first(now)] == [name for _, name in model.kept][::-1]
        assert (requests.nbytes > 0) == bool(model.kept) and requests.num_added == number + 1
    requests.expire(now + KEPT_S + 1.0)
    assert (len(requests), requests.nbytes) == (0, 0)


def test_bytes_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MAX_NBYTES", 4_000)
    requests = Requests(1_000)
    for number in range(100):
        requests.add(request_form(f"r{number}", why="x" * 500), 0.0)
    assert 0 < len(requests) < 8 and requests.nbytes <= 4_000


def test_nothing_is_kept_where_nothing_is_wanted() -> None:
    requests = Requests(0)
    requests.add(request_form("r"), 0.0)
    assert (len(requests), requests.is_on, requests.num_added) == (0, False, 0)


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(0, 8), st.integers(0, 10))
def test_who_has_seen_some_is_told_the_others_once(num_added: int, num_seen: int) -> None:
    requests = Requests(6)
    for number in range(num_added):
        requests.add(request_form(f"r{number}"), float(number))
    told = [form.id for form in requests.since(num_seen, 10.0)]
    assert told == [f"r{number}" for number in range(max(num_seen, num_added - 6), num_added)]


def test_a_request_is_found_by_the_clients_name_and_by_its_own() -> None:
    requests = Requests(9)
    requests.add(request_form("abc.0", http_id="abc"), 0.0)
    requests.add(request_form("other.0", http_id="other"), 1.0)
    for name in ("abc", "abc.0"):
        found = requests.find(name, 3.0)
        assert found is not None and (found.id, found.age_s) == ("abc.0", 3.0)
    assert requests.find("nobody", 3.0) is None


def test_the_timeline_has_no_gap_and_adds_up() -> None:
    form = request_form("r", phases_s={"queued": 0.1, "routed": 0.2, "prefilled": 0.3, "decoded": 0.4})
    parts = timeline(msgspec.structs.replace(form, engines=["a", "b"]))
    assert [part.where for part in parts] == ["gateway", "router", "a", "b"]
    for before, after in itertools.pairwise(parts):
        assert after.begin_s == pytest.approx(before.begin_s + before.seconds)
    assert sum(part.seconds for part in parts) == pytest.approx(1.0)


def test_a_timeline_says_who_generated_whoever_was_used_first() -> None:
    """A strategy asks its receiver before its sender."""
    phases = {"granted": 0.1, "prefilled": 0.2, "transferred": 0.3, "decoded": 0.4}
    form = request_form("r", phases_s=phases, engines=["receiver", "sender"])
    attempt = Attempt(
        "balanced",
        0,
        0.0,
        9,
        {},
        [],
        [],
        0,
        [],
        0,
        [SendSeen("sender", "receiver", 0, 8)],
        "receiver",
        8,
        False,
    )
    places = [part.where for part in timeline(form, attempt)]
    assert places == ["receiver", "sender", "sender", "receiver"]
    alone = msgspec.structs.replace(attempt, sends=[])
    assert {part.where for part in timeline(form, alone)} == {"receiver"}


def test_requests_are_chosen_and_sorted_as_asked() -> None:
    forms = [
        request_form("a", wall_s=1.0, ttft_s=0.9, key="k1", engines=["e0", "e1"], age_s=3.0),
        request_form("b", wall_s=3.0, ttft_s=0.1, key="k2", code="queue_full", age_s=2.0),
        request_form("c", wall_s=2.0, ttft_s=None, key="k1", strategy="balanced", age_s=1.0),
    ]

    def chosen(**values: str) -> str:
        return "".join(form.id for form in query_of(values).sorted(forms))

    assert (chosen(), chosen(order="slowest"), chosen(order="first_token")) == ("cba", "bca", "abc")
    assert (chosen(limit="1"), chosen(min_s="1.5"), chosen(key="k1")) == ("c", "cb", "ca")
    assert (chosen(engine="e1"), chosen(strategy="balanced")) == ("a", "c")
    assert (chosen(code="any"), chosen(code="queue_full"), chosen(code="nothing")) == ("b", "b", "")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"order": "best"}, "order"),
        ({"limit": "0"}, "limit"),
        ({"limit": str(MAX_LIMIT + 1)}, "limit"),
        ({"limit": "٣"}, "limit"),
        ({"min_s": "-1"}, "min_s"),
        ({"min_s": "nan"}, "min_s"),
        ({"min_s": "soon"}, "min_s"),
        ({"key": "k" * 257}, "key"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_choice_names_its_field(values: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        query_of(values)
    assert caught.value.field == field


def test_a_query_goes_to_siblings_and_back() -> None:
    query = query_of({"order": "slowest", "limit": "7", "min_s": "0.5", "key": "k"})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(query), type=Query) == query


def test_only_what_is_taken_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty thousand may be kept, and reading one costs as much as ten comparisons."""
    requests = Requests(9)
    for number in range(9):
        form = request_form(f"r{number}", wall_s=number % 5, ttft_s=number % 3, key=f"k{number % 2}")
        requests.add(form, float(number))
    read: list[str] = []

    class Decoder:
        def decode(self, line: bytes) -> RequestForm:
            form = msgspec.msgpack.decode(line, type=RequestForm)
            read.append(form.id)
            return form

    monkeypatch.setattr(remembered, "_decoder", Decoder())
    for values, ids in (
        ({"limit": "2"}, ["r8", "r7"]),
        ({"limit": "2", "order": "slowest"}, ["r4", "r8"]),
        ({"limit": "3", "order": "first_token"}, ["r8", "r5", "r2"]),
        ({"limit": "2", "order": "slowest", "key": "k1"}, ["r3", "r7"]),
        ({"key": "nobody"}, []),
    ):
        read.clear()
        assert [form.id for form in query_of(values).first(requests.kept_now(), 9.0)] == ids
        assert read == ids


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([None, 0.0, 1.0, 2.0]), st.sampled_from("ab"))))
def test_who_is_chosen_unread_is_who_is_chosen(made: list[tuple[int, float | None, str]]) -> None:
    requests = Requests(100)
    for number, (wall_s, ttft_s, name) in enumerate(made):
        form = request_form(
            f"r{number}", wall_s=wall_s, ttft_s=ttft_s, key=name, engines=[name, "e"], code=name
        )
        requests.add(form, float(number))
    for order in ORDERS:
        for chosen in ({}, {"key": "a"}, {"engine": "b"}, {"code": "any"}, {"min_s": "2"}):
            query = query_of({"order": order, "limit": "3", **chosen})
            first = query.first(requests.kept_now(), 500.0)
            assert first == query.sorted(requests.newest_first(500.0))


@pytest.mark.slow
def test_a_question_about_all_that_are_kept_holds_nobody_up() -> None:
    """It is answered aside: the loop of the gateway, and tokens with it, goes on meanwhile."""
    threads: list[int] = []

    class Watched(Query, frozen=True):
        def first(self, newest_first: Sequence[Kept], now: float) -> list[RequestForm]:
            threads.append(threading.get_ident())
            return super().first(newest_first, now)

    async def main() -> None:
        requests = Requests(9)
        requests.add(request_form("r"), 0.0)
        mesh, clock = Mesh(0.0, silence_s=5.0), lambda: 1.0
        view = View(requests, mesh, Feed("life"), clock=clock, wall_clock=clock)
        assert [form.id for form in (await view.ended(Watched(order="slowest"))).ended] == ["r"]

    asyncio.run(main())
    assert threads and threading.get_ident() not in threads
