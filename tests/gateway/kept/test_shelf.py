"""A shelf against a naive one: entries of owners, bounds that hold behind every put, several hands."""

from __future__ import annotations

import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microserve.gateway.kept.shelf import Bounds, Shelf
from tests.support.examples import examples

OWNERS, NAMES = st.sampled_from(["", "a", "b"]), st.sampled_from(["x", "y", "z"])
STEPS = st.lists(
    st.tuples(st.just("put"), OWNERS, NAMES, st.binary(max_size=6))
    | st.tuples(st.sampled_from(["get", "delete"]), OWNERS, NAMES, st.none())
    | st.tuples(st.just("wait"), OWNERS, NAMES, st.none()),
    max_size=12,
)
BOUNDS = Bounds(max_nbytes=12, max_count=3, max_age_s=10.0)


class Naive:
    """What a shelf is to be."""

    def __init__(self) -> None:
        self.entries: OrderedDict[tuple[str, str], tuple[float, bytes]] = OrderedDict()

    def put(self, owner: str, name: str, data: bytes, now: float) -> None:
        self.entries.pop((owner, name), None)
        self.entries[owner, name] = (now, data)
        for key, (at, _) in list(self.entries.items()):
            if at <= now - BOUNDS.max_age_s:
                del self.entries[key]
        while self.nbytes > BOUNDS.max_nbytes:
            self.let_go((owner, name), len)
        while len(self.entries) > BOUNDS.max_count:
            self.let_go((owner, name), lambda data: 1)

    def let_go(self, newest: tuple[str, str], weight: Callable[[bytes], int]) -> None:
        """The oldest of whoever has most beside the newest; of equals, of who has the oldest."""
        others = [key for key in self.entries if key != newest]
        owners = list(dict.fromkeys(owner for owner, _ in others))
        most = max(
            owners, key=lambda one: sum(weight(self.entries[key][1]) for key in others if key[0] == one)
        )
        del self.entries[next(key for key in others if key[0] == most)]

    @property
    def nbytes(self) -> int:
        return sum(len(data) for _, data in self.entries.values())

    def get(self, owner: str, name: str, now: float) -> bytes | None:
        at, data = self.entries.get((owner, name), (0.0, None))
        return data if at > now - BOUNDS.max_age_s else None


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS)
def test_a_shelf_is_what_a_naive_one_is(steps: list[tuple[str, str, str, bytes | None]]) -> None:
    now = 1000.0
    with TemporaryDirectory() as directory:
        path = Path(directory) / "kept.db"
        # Two hands: what one does, the other sees.
        with closing(Shelf(path, BOUNDS)) as one, closing(Shelf(path, BOUNDS)) as other:
            naive = Naive()
            for number, (what, owner, name, data) in enumerate(steps):
                shelf = (one, other)[number % 2]
                now += 4.0 if what == "wait" else 0.0
                if what == "put" and data is not None:
                    shelf.put(owner, name, data, now)
                    naive.put(owner, name, data, now)
                elif what == "delete":
                    assert shelf.delete(owner, name) == (naive.entries.pop((owner, name), None) is not None)
                assert shelf.get(owner, name, now) == naive.get(owner, name, now)
            with closing(sqlite3.connect(path)) as database:
                [total] = database.execute("SELECT count, nbytes FROM total")
                assert total == (len(naive.entries), naive.nbytes)


def test_one_owner_does_not_push_out_what_others_have(tmp_path: Path) -> None:
    with closing(Shelf(tmp_path / "kept.db", BOUNDS)) as shelf:
        shelf.put("a", "x", b"...", 1000.0)
        for number in range(20):
            shelf.put("b", f"{number}", b"......", 1001.0 + number / 100)
        assert shelf.get("a", "x", 1002.0) == b"..."
        assert shelf.get("b", "19", 1002.0) == b"......"


def test_what_is_larger_than_all_may_be_is_not_put(tmp_path: Path) -> None:
    with closing(Shelf(tmp_path / "kept.db", BOUNDS)) as shelf:
        shelf.put("a", "x", b"1", 1000.0)
        shelf.put("a", "y", b"1" * 13, 1000.0)
        assert shelf.get("a", "x", 1000.0) == b"1"
        assert shelf.get("a", "y", 1000.0) is None


def test_the_file_is_for_its_owners_eyes_alone(tmp_path: Path) -> None:
    with closing(Shelf(tmp_path / "kept.db", BOUNDS)) as shelf:
        shelf.put("a", "x", b"1", 1000.0)
        assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_many_hands_at_a_time_lose_nothing(tmp_path: Path) -> None:
    bounds = Bounds(1 << 20, 1000, 100.0)
    path = tmp_path / "kept.db"
    errors: list[Exception] = []

    def work(number: int) -> None:
        try:
            with closing(Shelf(path, bounds)) as shelf:
                for index in range(20):
                    shelf.put("a", f"{number}-{index}", b"%d" % index, 1000.0)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert errors == []
    with closing(Shelf(path, bounds)) as shelf:
        names = [f"{number}-{index}" for number in range(4) for index in range(20)]
        assert all(shelf.get("a", name, 1000.0) is not None for name in names)


def test_a_file_that_is_none_of_ours_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "kept.db"
    file.write_bytes(b"no database " * 100)
    with pytest.raises(sqlite3.DatabaseError):
        Shelf(file, BOUNDS)
    with pytest.raises(OSError):
        Shelf(tmp_path / "nowhere" / "kept.db", BOUNDS)
