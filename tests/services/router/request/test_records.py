"""What a router remembers: bounded in number and in bytes, found by any name, and nothing private in it."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import pytest

from microserve.protocol.messages.engine import EngineLoad
from microserve.protocol.messages.strategy.decisions import (
    MAX_ATTEMPTS,
    MAX_EXPLAINED_NBYTES,
    MAX_NOTES,
    MAX_PICKS,
    Explanation,
)
from microserve.services.router.engines.connection import Connection
from microserve.services.router.engines.load import Load, LoadBook
from microserve.services.router.request.decision import Decision, Send
from microserve.services.router.request.records import MAX_RECORD_NBYTES, Head, Records
from microserve.services.router.request.trail import Trail
from tests.support.router.paper_mesh import PaperEngine

HEAD = Head("mine", 3, True, ["user"], 16, 40, 5, 17, "stop", "")


def trail(*, num_picks: int = 1, num_candidates: int = 2) -> Trail:
    made = Trail("mine", 3, 40, Decision([Send("e0", "e1", 0, 30)], "e1", 30, True), came=10.0, now=10.5)
    ids = [f"e{number}" for number in range(num_candidates)]
    loads = [Load(number, 2 * number) for number in range(num_candidates)]
    for _ in range(num_picks):
        costs = [float(number) for number in range(num_candidates)]
        made.choose("decode", "cost", 0.0, ids, costs, loads, "e1", ["e9"], "", (), 10.75)
    return made


def only(records: Records, wanted: str, now: float = 30.0) -> Explanation:
    [found], num_left_out = records.find(wanted, now)
    assert num_left_out == 0
    return found


def test_a_record_says_what_was_chosen_among_what() -> None:
    records = Records(10, 1 << 20)
    records.add("r1.0a0a0a0a-0", HEAD, [trail()], 20.0)
    found = only(records, "r1")
    assert (found.strategy, found.version, found.reason, found.age_s) == ("mine", 3, "stop", 10.0)
    [attempt] = found.attempts
    [pick] = attempt.picks
    assert (attempt.at_s, pick.at_s) == (0.5, 0.75)
    assert (pick.label, pick.by, pick.chosen, pick.excluded) == ("decode", "cost", "e1", ["e9"])
    assert (pick.candidates, pick.costs) == (["e0", "e1"], [0.0, 1.0])
    assert (pick.uncached_tokens, pick.sequences) == ([0, 1], [0, 2])
    assert [(s.source, s.target, s.begin, s.end) for s in attempt.sends] == [("e0", "e1", 0, 30)]
    assert (attempt.engine_id, attempt.begin, attempt.awaits_first) == ("e1", 30, True)


@pytest.mark.parametrize(
    "wanted",
    ["client", "client.0a0a0a0a", "client.0a0a0a0a-1", "client.0a0a0a0a-1~2", "chatcmpl-client.0a0a0a0a"],
)
def test_it_is_found_by_any_of_its_names(wanted: str) -> None:
    records = Records(10, 1 << 20)
    for name in ("client.0a0a0a0a-1~2", "clients.0a0a0a0a-1", "other.0a0a0a0a-1"):
        records.add(name, HEAD, [], 1.0)
    assert only(records, wanted).request_id == "client.0a0a0a0a-1~2"


def test_the_newest_comes_first_and_those_that_run_before_it() -> None:
    records = Records(10, 1 << 20)
    for number in range(3):
        records.add(f"r.0a0a0a0a-{number}", HEAD, [], float(number))
    live = records.describe("r.0a0a0a0a-9", HEAD._replace(reason=""), [trail()])
    found, _ = records.find("r", 5.0, [live])
    assert [each.request_id[-1] for each in found] == ["9", "2", "1", "0"]
    assert [each.age_s for each in found] == [0.0, 3.0, 4.0, 5.0]


def test_the_oldest_make_room_by_number() -> None:
    records = Records(100, 1 << 30)
    for number in range(250):
        records.add(f"r{number}", HEAD, [trail()], 1.0)
    assert len(records) == 100
    assert records.find("r149", 2.0) == ([], 0)
    assert only(records, "r150").request_id == "r150"


def test_the_oldest_make_room_by_bytes() -> None:
    records = Records(10_000, 100_000)
    sizes = []
    for number in range(500):
        records.add(f"r{number}", HEAD, [trail()], 1.0)
        sizes.append(records.nbytes)
    assert max(sizes) <= 100_000 < 2 * max(sizes)
    assert sizes[0] * len(records) == pytest.approx(records.nbytes, rel=0.05)
    assert any(later <= earlier for earlier, later in pairwise(sizes)), "some had to go"


def engines(count: int) -> list[Connection]:
    made = [PaperEngine(f"e{number}", EngineLoad(free_blocks=number), ["x"]) for number in range(count)]
    return cast("list[Connection]", made)


def test_what_requests_saw_is_kept_and_counted_once_for_all_that_saw_it() -> None:
    seen, book, records = engines(40), LoadBook(), Records(100, 1 << 30)
    account = book.open()
    sizes = []
    for number in range(300):
        if number == 150:
            cast(PaperEngine, seen[7]).load_at = 8.0  # a heartbeat
            account.reserve_prefill("e7", "p", 500)
        made = Trail("mine", 3, 40, Decision(), 10.0, 10.5, records.sights)
        made.see(seen, None, book, 11.0)
        records.add(f"r{number}", HEAD, [made], 12.0)
        sizes.append(records.nbytes)
    one, both = sizes[1] - sizes[0], sizes[160] - sizes[140]
    assert sizes[0] > 4 * one, "the others share what the first one saw"
    assert 0.9 * (sizes[0] - one) < both < 1.1 * (sizes[0] - one), "there are two of them for a while"
    assert sizes[299] == pytest.approx(sizes[140], rel=0.01), "and the older one goes with its last record"
    assert records.nbytes == pytest.approx(100 * one + sizes[0] - one, rel=0.03)
    for number in (200, 299):
        [attempt] = only(records, f"r{number}").attempts
        assert [each.engine_id for each in attempt.engines] == [f"e{n}" for n in range(40)]
        eighth = attempt.engines[7]
        assert (eighth.own_tokens, eighth.load_age_s, eighth.labels) == (500, 3.0, ["x"])
        assert (eighth.load, attempt.engines[8].load_age_s) == (EngineLoad(free_blocks=7), 11.0)


def test_a_strategy_s_own_labels_are_what_it_saw() -> None:
    seen, records = engines(2), Records(10, 1 << 20)
    made = Trail("mine", 3, 40, Decision(), 10.0, 10.5, records.sights)
    made.see(seen, [["mine"], []], LoadBook(), 11.0)
    records.add("r", HEAD, [made], 12.0)
    assert [each.labels for each in only(records, "r").attempts[0].engines] == [["mine"], []]


def test_none_is_kept_where_none_is_wanted() -> None:
    records = Records(0, 1 << 20)
    records.add("r", HEAD, [trail()], 1.0)
    assert (len(records), records.nbytes, records.is_on) == (0, 0, False)


def test_an_attempt_keeps_its_first_picks_and_notes_and_counts_the_others() -> None:
    made = trail(num_picks=MAX_PICKS + 9)
    for number in range(MAX_NOTES + 4):
        made.note(f"n{number}", {"value": number}, 11.0)
    records = Records(10, 1 << 20)
    records.add("r", HEAD, [made], 1.0)
    [attempt] = only(records, "r").attempts
    assert (len(attempt.picks), attempt.num_picks) == (MAX_PICKS, MAX_PICKS + 9)
    assert (len(attempt.notes), attempt.num_notes) == (MAX_NOTES, MAX_NOTES + 4)
    assert (attempt.notes[-1].text, attempt.notes[-1].at_s) == (f"n{MAX_NOTES - 1}", 1.0)
    assert made.in_short().endswith(f"; {MAX_PICKS + 9 - 3} more")


def test_a_request_keeps_its_last_attempts() -> None:
    records = Records(10, 1 << 20)
    trails = [Trail(f"s{number}", 0, 40, Decision(), 0.0, 1.0) for number in range(MAX_ATTEMPTS + 3)]
    records.add("r", HEAD, trails, 1.0)
    found = only(records, "r")
    assert [each.strategy for each in found.attempts] == [
        f"s{number}" for number in range(3, MAX_ATTEMPTS + 3)
    ]
    assert found.num_attempts == MAX_ATTEMPTS + 3


def test_what_would_be_too_long_goes_without_candidates() -> None:
    records = Records(10, 1 << 30)
    records.add("r", HEAD, [trail(num_picks=MAX_PICKS, num_candidates=1_000)], 1.0)
    found = only(records, "r")
    assert found.is_cut and records.nbytes < MAX_RECORD_NBYTES
    picks = found.attempts[0].picks
    assert [(pick.chosen, pick.candidates) for pick in picks] == [("e1", [])] * MAX_PICKS


def test_an_answer_is_bounded_and_says_how_many_it_leaves_out() -> None:
    records = Records(100, 1 << 30)
    for number in range(30):
        records.add(f"r.0a0a0a0a-{number}", HEAD, [trail(num_picks=20, num_candidates=300)], 1.0)
    nbytes = records.nbytes / 30
    found, num_left_out = records.find("r", 2.0)
    assert len(found) + num_left_out == 30 and num_left_out > 0
    assert len(found) * nbytes < MAX_EXPLAINED_NBYTES + 2 * nbytes
