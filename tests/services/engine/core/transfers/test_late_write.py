"""Late one-sided writes at every operation of a transfer: the next user of the blocks never sees them.

Exhaustive over the operations in the heavy lane; otherwise a quarter of that, in which each operation still
meets every action and every fate. With a negative control for each thing that the promise rests on: without
it, the same enumeration finds wrong tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import structlog

from microserve.kvcache.grant.entry import Entry
from microserve.kvcache.grant.table import GrantEvent, GrantTable
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.local import MemoryHeap
from tests.support.engine.late_write.case import (
    ACTIONS,
    EARLY,
    FAILING,
    FATES,
    TRANSFERS,
    WHOLE,
    Case,
    Outcome,
    Transfer,
    num_points,
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Ten thousand transfers log too much."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


def all_points(transfer: Transfer) -> range:
    """Before every operation, and after the last."""
    return range(num_points(transfer) + 1)


def outcomes(
    transfer: Transfer,
    fate: str,
    *,
    receives: bool = False,
    action_name: str = "abort",
    points: Sequence[int] | None = None,
) -> list[Outcome]:
    """One for each point; all of them, if none are named."""
    action = next(action for action in ACTIONS if action.name == action_name)
    points = all_points(transfer) if points is None else points
    return [Case(transfer, action, receives=receives).run(point, fate) for point in points]


def wrong_points(found: list[Outcome]) -> set[int]:
    return {point for point, outcome in enumerate(found) if outcome.wrong}


def points_of(found: list[Outcome], operation: str) -> set[int]:
    return {point for point, outcome in enumerate(found) if outcome.operation == operation}


def test_the_points_are_every_operation_of_a_transfer() -> None:
    """Three chunks of a 13-token prompt, two layers, four scattered blocks."""
    found = outcomes(WHOLE, "dies")
    names = Counter(outcome.operation for outcome in found)
    # Slices: 3, 3 and 2, by the chunks; a whole block is one, a part of one is its K and its V.
    num_slices = (3 + 3 + 2) * 2
    # STATE and CLAIM, then STATE for each layer of each chunk.
    num_reads = 2 + 3 * 2
    # WRITER BEGIN END CLAIM; 2 + 2 + 1 tags a layer; checksum and arrival; FIRST_TOKEN.
    num_signals = 4 + 5 * 2 + 3 * 2 * 2 + 1

    assert names == {
        "hold": 1,
        "read": num_reads,
        "put": 2 * num_slices,
        "signal": num_signals,
        "let go": 1,
        "end": 1,
    }


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.heavy)])
@pytest.mark.parametrize(
    ("transfer", "receives"),
    [*((transfer, False) for transfer in TRANSFERS), (WHOLE, True), (FAILING, True)],
    ids=lambda value: value.name if isinstance(value, Transfer) else "received" if value else "computed",
)
def test_no_late_write_reaches_the_next_user(transfer: Transfer, receives: bool, every: int) -> None:
    """Every operation x every way the grant can end x every fate of the sender, or the ``every``-th of these.

    The next user computes its KV, or receives it: then it also takes over the slot with its control words.
    """
    num_cases = num_reused = num_mid_step = 0
    for number, action in enumerate(ACTIONS):
        for turn, fate in enumerate(FATES):
            points = all_points(transfer)[(number + turn) % every :: every]
            found = outcomes(transfer, fate, receives=receives, action_name=action.name, points=points)
            for point, outcome in zip(points, found, strict=True):
                where = f"{action.name}, sender {fate}, before operation {point} ({outcome.operation})"

                assert not outcome.wrong, f"{where}: wrong tokens for {outcome.wrong}"
                assert not outcome.broken, f"{where}: {outcome.broken}"
                assert not outcome.num_refused, f"{where}: a stale sender was in a newer one's way"
                num_reused += outcome.is_reused
                num_mid_step += outcome.is_mid_step
            num_cases += len(found)
    num = num_points(transfer)
    print(
        f"\n{transfer.name}: {num} operations, {num_cases} cases; in {num_reused} the blocks had a new user "
        f"when the delayed operation came, in {num_mid_step} the receiver was in the middle of a step"
    )

    assert num_cases == (num + 1) * len(ACTIONS) * len(FATES) // every
    assert num_reused > 0
    assert (num_mid_step > 0) is (transfer is EARLY)


# --- negative controls -------------------------------------------------------------------------------


def test_without_quarantine_every_late_copy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrantTable, "_let_go_drained", lambda table, entry: True)
    for transfer in TRANSFERS:
        found = outcomes(transfer, "goes on")
        wrong, puts = wrong_points(found), points_of(found, "put")
        print(f"\n{transfer.name}: wrong tokens at {len(wrong)} of {len(found)} points, {len(puts)} copies")

        # And at no other point: the state is read anew before each layer.
        assert wrong == puts, transfer.name


def test_with_lanes_that_hold_nothing_every_late_copy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryHeap, "is_held", lambda heap, slot, lane: False)
    found = outcomes(WHOLE, "goes on")

    assert wrong_points(found) == points_of(found, "put")


def test_a_quarantine_that_ends_by_a_timer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    poll = GrantTable.poll

    def impatient(table: GrantTable, now: float) -> list[GrantEvent]:
        entries: list[Entry] = list(table._entries.values())
        for entry in entries:
            if now > entry.since + 600.0:
                entry.held_lanes.clear()
        return poll(table, now)

    monkeypatch.setattr(GrantTable, "poll", impatient)
    found = outcomes(WHOLE, "freezes")

    assert wrong_points(found) == points_of(found, "put")
    assert not wrong_points(outcomes(WHOLE, "goes on"))


def test_a_sender_that_does_not_read_the_state_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it did not hold the lane yet: the one point at which nothing else protects the blocks."""
    monkeypatch.setattr(LaneWriter, "require_grant_open", lambda writer: None)
    found = outcomes(WHOLE, "goes on")

    assert wrong_points(found) == points_of(found, "hold")


def test_with_neither_state_nor_quarantine_every_point_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrantTable, "_let_go_drained", lambda table, entry: True)
    monkeypatch.setattr(LaneWriter, "require_grant_open", lambda writer: None)
    found = outcomes(WHOLE, "goes on")

    assert wrong_points(found) == set(range(max(points_of(found, "put")) + 1))
