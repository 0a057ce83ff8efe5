"""What keys have used is kept on disk, summed over gateways, and never waited for."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from microserve.gateway.keys.ledger import Ledger, add_counts, read_counts
from microserve.gateway.keys.usage import Counts, UsageBook, day_of, seconds_left_of
from microserve.protocol import log
from tests.support.gateway.gateway_world import run

NOON = 1_796_000_000.0 // 86_400 * 86_400 + 43_200
DAY = day_of(NOON)


def test_days_are_of_utc() -> None:
    assert day_of(0.0) == "1970-01-01"
    assert (day_of(86_399.9), day_of(86_400.0)) == ("1970-01-01", "1970-01-02")
    assert seconds_left_of(NOON) == 43_200


def test_two_gateways_add_to_one_file_and_know_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"

    async def main() -> None:
        books = [UsageBook(), UsageBook()]
        ledgers = [Ledger(str(path), book, lambda: NOON, flush_s=0.005) for book in books]
        for ledger in ledgers:
            ledger.start()
        for book in books:
            for _ in range(3):
                book.add(NOON, "a", Counts(1, 0, 10, 4, 5))
                await asyncio.sleep(0.005)
        for book in books:
            while book.tokens_of(NOON, "a") != 90:
                await asyncio.sleep(0.005)
        for ledger in ledgers:
            await ledger.close()
        assert read_counts(path) == {(DAY, "a"): Counts(6, 0, 60, 24, 30)}
        # The next life of a gateway goes on from there.
        book = UsageBook()
        again = Ledger(str(path), book, lambda: NOON, flush_s=0.005)
        again.start()
        while book.tokens_of(NOON, "a") != 90:
            await asyncio.sleep(0.005)
        book.add(NOON, "b", Counts(refused=1))
        await again.close()
        assert read_counts(path)[DAY, "b"] == Counts(refused=1), "what came last is written at the end"

    run(main())


def test_where_others_do_not_matter_the_file_is_left_alone_while_nothing_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"

    class Told(UsageBook):
        num_written = 0

        def written(self, shared: Mapping[tuple[str, str], Counts]) -> None:
            super().written(shared)
            self.num_written += 1

    async def main() -> None:
        book = Told()
        ledger = Ledger(str(path), book, lambda: NOON, asks_others=False, flush_s=0.002)
        ledger.start()
        while book.num_written < 1:
            await asyncio.sleep(0.002)
        book.add(NOON, "a", Counts(1, 0, 10, 0, 5))
        while book.num_written < 2:
            await asyncio.sleep(0.002)
        path.unlink()
        await asyncio.sleep(0.05)
        assert not path.exists()
        book.add(NOON, "a", Counts(1, 0, 10, 0, 5))
        while not path.exists():
            await asyncio.sleep(0.002)
        await ledger.close()
        assert read_counts(path) == {(DAY, "a"): Counts(1, 0, 10, 0, 5)}

    run(main())


def test_a_disk_that_takes_nothing_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "not yet there" / "usage.db"

    async def main() -> None:
        book = UsageBook()
        with capture_logs() as lines:
            ledger = Ledger(str(path), book, lambda: NOON, flush_s=0.002)
            ledger.start()
            book.add(NOON, "a", Counts(1, 0, 10, 0, 5))
            while not lines:
                await asyncio.sleep(0.002)
            book.add(NOON, "a", Counts(1, 0, 10, 0, 5))
            assert book.tokens_of(NOON, "a") == 30
            await asyncio.sleep(0.05)
            path.parent.mkdir()
            while not path.exists():
                await asyncio.sleep(0.01)
            await ledger.close()
        assert [line["event"] for line in lines] == [log.USAGE_UNWRITTEN], "it is said once"
        assert read_counts(path) == {(DAY, "a"): Counts(2, 0, 20, 0, 10)}

    run(main())


def test_days_can_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with pytest.raises(sqlite3.Error):
        read_counts(path)
    assert not path.exists()
    deltas = {(f"2026-11-{day}", "a"): Counts(requests=day) for day in (10, 11, 12)}
    assert add_counts(path, deltas, "2026-11-12") == {("2026-11-12", "a"): Counts(requests=12)}
    assert list(read_counts(path, since="2026-11-11", until="2026-11-11")) == [("2026-11-11", "a")]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "take", "written", "put_back"]), st.integers(0, 5)), max_size=60
    )
)
def test_every_count_is_in_the_ledger_or_on_its_way(steps: list[tuple[str, int]]) -> None:
    book, ledger, added, flying = UsageBook(), Counts(), 0, False
    for step, amount in steps:
        if step == "add":
            book.add(NOON, "a", Counts(output_tokens=amount))
            added += amount
        elif step == "take" and not flying:
            ledger_next, flying = ledger + book.take().get((DAY, "a"), Counts()), True
        elif step == "written" and flying:
            ledger, flying = ledger_next, False
            book.written({(DAY, "a"): ledger})
        elif step == "put_back" and flying:
            flying = False
            book.put_back()
        assert book.tokens_of(NOON, "a") == book.total.get("a", Counts()).tokens == added


def test_a_ledger_that_is_away_for_days_costs_bounded_memory() -> None:
    book = UsageBook()
    for day in range(30):
        book.add(NOON + day * 86_400, "a", Counts(output_tokens=1))
    assert len(book.take()) == 2
