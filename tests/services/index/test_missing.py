"""Who is no member, and why: what an operator is told of engines that the index refuses, or has lost."""

from __future__ import annotations

from typing import Any

from microserve.protocol.bus.peers import Loss
from microserve.protocol.errors import EngineLost, InvalidRequest
from microserve.services.index.missing import LOST_S, MAX_MISSING, REFUSED_S, Missing
from tests.support.index.index_world import make_info


def told(missing: Missing, now: float) -> list[tuple[Any, ...]]:
    return [(each.engine_id, each.code, each.field, each.age_s) for each in missing.report(now)]


def test_an_engine_that_is_refused_is_told_as_long_as_it_asks() -> None:
    missing, error = Missing(), InvalidRequest("e2 has block_size 32", field="block_size")
    missing.refused(make_info("e2"), error, 10.0)
    missing.refused(make_info("e2"), error, 12.0)

    assert told(missing, 15.0) == [("e2", "invalid_request", "block_size", 3.0)]
    assert told(missing, 12.1 + REFUSED_S) == []


def test_an_engine_that_was_lost_is_told_until_it_is_back() -> None:
    missing = Missing()
    missing.lost(make_info("e1"), Loss.SILENT, 0.0)
    missing.lost(make_info("e2"), Loss.STUCK, 0.0)

    assert told(missing, 100.0) == [("e1", "engine_lost", "", 100.0), ("e2", "engine_lost", "", 100.0)]
    missing.present(make_info("e1", incarnation=99))
    assert [each.detail for each in missing.report(100.0)] == ["has work and makes no progress"]
    assert told(missing, LOST_S + 1.0) == []


def test_of_two_engines_of_one_id_the_one_that_was_replaced_is_told() -> None:
    missing = Missing()
    missing.refused(make_info(incarnation=11), EngineLost("replaced", field="incarnation"), 0.0)
    missing.present(make_info(incarnation=12))

    assert told(missing, 1.0) == [("e1", "engine_lost", "incarnation", 1.0)]
    missing.present(make_info(incarnation=11))
    assert told(missing, 1.0) == []


def test_the_oldest_are_forgotten() -> None:
    missing = Missing()
    for number in range(MAX_MISSING + 3):
        missing.lost(make_info(f"e{number}"), Loss.SILENT, 0.0)

    assert [each.engine_id for each in missing.report(1.0)] == [f"e{n}" for n in range(3, MAX_MISSING + 3)]
