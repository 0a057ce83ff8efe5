"""The scoreboard of a router: what is counted, that it is bounded, and what can be read from it."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages.engine import Usage
from microserve.protocol.messages.router import Ended, Phases
from microserve.protocol.messages.strategy.decisions import MAX_SCORES
from microserve.protocol.messages.strategy.scores import NUM_BUCKETS, bucket_of, bucket_start_s
from microserve.services.router.rollout.scoreboard import (
    MAX_CODES,
    MAX_ENGINE_SCORES,
    MAX_VERSIONS,
    OTHER,
    Scoreboard,
)
from microserve.services.router.rollout.sums import NO_TIMES, Timing, timing_of


def ended(version: int = 1, engine: str = "e1", ttft_s: float = 0.1, **fields: object) -> Ended:
    usage = Usage(prompt_tokens=40, cached_tokens=16, received_tokens=8, output_tokens=5)
    made = Ended(
        "length",
        usage,
        Phases(total_s=ttft_s + 0.4, decoded_s=0.4),
        "mine",
        [engine],
        strategy_version=version,
        share="stable",
    )
    return (
        made
        if not fields
        else Ended(**{name: getattr(made, name) for name in made.__struct_fields__} | fields)
    )


def add(board: Scoreboard, end: Ended, *, now: float = 1.0, failed: bool = False) -> None:
    board.add(now, end, failed, timing_of(end, failed), 0)


def test_everything_is_counted_for_the_version_and_for_the_engine() -> None:
    board = Scoreboard()
    add(board, ended(num_moves=2))
    add(board, ended(engine="e2"), now=3.0)
    add(board, ended(reason="error", code="queue_full", engines=[]), now=3.0)
    add(board, ended(), now=3.0, failed=True)
    add(board, ended(version=2, share="canary"), now=3.0)
    scores, left_out = board.told(11.0, "mine")
    assert left_out == 0
    found = {(score.version, score.share, score.engine_id): score for score in scores}
    assert set(found) == {(1, "stable", ""), (2, "canary", ""), (1, "stable", "e1"), (1, "stable", "e2"),
                          (2, "canary", "e1")}  # fmt: skip
    whole = found[1, "stable", ""]
    assert (whole.num_requests, whole.failures, whole.num_mistakes, whole.num_moves) == (
        4,
        {"queue_full": 1},
        1,
        2,
    )
    assert (whole.prompt_tokens, whole.cached_tokens, whole.received_tokens) == (160, 64, 32)
    assert (whole.ttft.num, whole.jct.num, whole.seconds) == (2, 2, 10.0), "what did not go as it wanted"
    assert whole.side is not None
    assert (whole.side.num_requests, whole.side.num_failed) == (4, 2)
    assert (found[1, "stable", "e1"].num_requests, found[1, "stable", "e2"].seconds) == (2, 8.0)
    assert board.told(11.0, "other") == ([], 0)


def test_tokens_that_came_in_one_message_do_not_rule_over_the_others() -> None:
    """No time is between them, and means are of logarithms."""
    board = Scoreboard()
    for number in range(10):
        decoded_s = 0.0 if number % 2 else 0.004
        add(board, ended(phases=Phases(total_s=0.1 + decoded_s, decoded_s=decoded_s)))
    [whole, _], _ = board.told(1.0)
    assert 0.5e-4 < math.exp(whole.tpot.log_sum / whole.tpot.num) < 1e-3


def test_it_is_bounded_however_many_versions_engines_and_codes_there_are() -> None:
    board = Scoreboard()
    for number in range(2 * MAX_VERSIONS):
        add(board, ended(version=number), now=float(number))
        add(board, ended(version=0), now=float(number))
    for number in range(MAX_ENGINE_SCORES + 100):
        add(board, ended(version=0, engine=f"e{number}", code=f"code {number}", reason="error"), now=1e6)
    assert len(board) == MAX_VERSIONS
    scores, left_out = board.told(1e6)
    assert (len(scores), left_out) == (MAX_SCORES, MAX_VERSIONS + MAX_ENGINE_SCORES - MAX_SCORES)
    [kept] = [score for score in scores if (score.version, score.engine_id) == (0, "")]
    assert kept.num_requests > MAX_ENGINE_SCORES, "what is in use stays"
    assert len(kept.failures) == MAX_CODES + 1
    assert kept.failures[OTHER] > 0


def test_times_are_in_their_buckets_and_what_is_too_short_or_long_at_the_ends() -> None:
    board, rng = Scoreboard(), random.Random(1)
    seconds = [rng.lognormvariate(-1.0, 1.0) for _ in range(2000)] + [1e-9, 1e9]
    for each in seconds:
        board.add(1.0, ended(), False, Timing(ttft=math.log(each)), 0)
    score = board.told(1.0)[0][0]
    assert sum(score.ttft.buckets.values()) == score.ttft.num == len(seconds)
    assert {bucket_of(each) for each in seconds} == set(score.ttft.buckets)
    assert {0, NUM_BUCKETS - 1} <= set(score.ttft.buckets)
    assert score.ttft.log_sum == sum(map(math.log, seconds))


@given(st.floats(1e-4, 8000.0))
def test_a_time_is_in_the_bucket_that_begins_below_it(seconds: float) -> None:
    bucket = bucket_of(seconds)
    assert bucket_start_s(bucket) <= seconds * (1 + 1e-9)
    assert seconds <= bucket_start_s(bucket + 1) * (1 + 1e-9)


def test_sums_are_of_all_products_of_what_is_known_and_the_time() -> None:
    board = Scoreboard()
    known = [(7, 0.5), (0, 2.0)]
    for num_unheld, jct in known:
        board.add(1.0, ended(), False, Timing(jct=jct), num_unheld)
    board.add(1.0, ended(), True, NO_TIMES, 9)
    side = board.told(1.0)[0][0].side
    assert side is not None
    rows = [[1.0, math.log1p(unheld), math.log1p(40), math.log1p(5), y] for unheld, y in known]
    wanted = [sum(row[i] * row[j] for row in rows) for i in range(5) for j in range(i, 5)]
    assert [round(each, 9) for each in side.jct] == [round(each, 9) for each in wanted]
    assert side.ttft == [], "no request had one"
