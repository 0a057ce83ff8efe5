"""Rows: their order, the filter, and that no cell commands a terminal."""

from __future__ import annotations

import msgspec
import pytest

from microserve.services.command.top.column import (
    ENGINES,
    REQUESTS,
    Order,
    engine_rows,
    key_rows,
    request_rows,
    strategy_rows,
)
from microserve.services.command.top.place import Place, Way, command_of
from tests.support.command.view_server import KEY
from tests.support.gateway.view_forms import engine_form, request_form

LOST = msgspec.structs.replace(engine_form("e9"), state="lost", load=None, detail="silent")


def ids(order: Order | None, needle: str = "") -> list[str]:
    engines = [engine_form("e1", running=3), LOST, engine_form("e0", running=12), engine_form("e2")]
    return [row.id for row in engine_rows(engines, order, needle).rows]


def test_numbers_go_from_the_highest_and_names_from_the_lowest() -> None:
    run = [column.title for column in ENGINES].index("run")
    assert ids(Order()) == ["e0", "e1", "e2", "e9"]
    assert ids(Order(reverse=True)) == ["e9", "e2", "e1", "e0"]
    assert ids(Order(run)) == ["e0", "e1", "e2", "e9"]
    assert ids(Order(run, reverse=True)) == ["e9", "e2", "e1", "e0"]
    assert ids(None) == ["e1", "e9", "e0", "e2"]


def test_a_filter_looks_into_every_cell() -> None:
    assert ids(Order(), "LOST") == ["e9"]
    assert ids(Order(), "e1") == ["e1"]
    assert ids(Order(), "nothing such") == []


@pytest.mark.parametrize("place", range(len(ENGINES)))
def test_every_column_of_engines_sorts_members_and_others(place: int) -> None:
    assert sorted(ids(Order(place))) == ["e0", "e1", "e2", "e9"]


@pytest.mark.parametrize("place", range(len(REQUESTS)))
def test_every_column_of_requests_sorts_what_runs_and_what_failed(place: int) -> None:
    forms = [
        request_form("a", at=0.0, ttft_s=None, output_tokens=0),
        request_form("b", engines=["e0", "e1"], why="x"),
        request_form("c", status=503, code="no_engines", ttft_s=None),
    ]
    assert sorted(row.id for row in request_rows(forms, Order(place)).rows) == ["a", "b", "c"]


def test_no_text_from_outside_commands_the_terminal() -> None:
    bad = "\x1b[2J\u202e"
    tables = [
        engine_rows([msgspec.structs.replace(engine_form(bad), labels=[bad], host=bad)], None),
        request_rows([request_form(bad, key=bad, why=bad, strategy=bad, engines=[bad], code=bad)], None),
        key_rows([msgspec.structs.replace(KEY, name=bad)], None),
        strategy_rows([{"strategy": bad, "stable": {"version": 1, "parameters": {bad: bad}}}], None),
    ]
    for table in tables:
        assert all(cell.isprintable() for row in table.rows for cell in row.cells)
        assert "\\x1b[2J\\u202e" in table.rows[0].cells[0]


def test_one_goes_in_and_comes_back() -> None:
    way = Way()
    way.enter("requests", "e0")
    way.enter("request", "r1")
    way.filter("x")
    way.back()
    assert way.place == Place("request", "r1")
    way.back()
    assert way.place.subject == "e0"
    way.enter("keys")
    assert (way.place.kind, way.depth) == ("keys", 2)
    way.back()
    way.back()
    assert (way.place.kind, way.depth) == ("mesh", 1)


def test_sorting_goes_round() -> None:
    way = Way()
    for _ in ENGINES[1:]:
        way.sort()
    assert way.place.order == Order(len(ENGINES) - 1)
    way.sort()
    assert way.place.order is None
    way.sort()
    way.reverse()
    assert way.place.order == Order(0, reverse=True)


@pytest.mark.parametrize(
    ("typed", "meant"), [("mesh", "mesh"), (" Req ", "requests"), ("k", "keys"), ("q", "quit"), ("he", "")]
)
def test_a_command_is_known_by_its_beginning(typed: str, meant: str) -> None:
    if meant:
        assert command_of(typed) == meant
    else:
        with pytest.raises(ValueError, match="health"):
            command_of(typed)
