"""The terminal, by textual's pilot: keys, what is behind a row, and a gateway that goes and comes back."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import ParamSpec

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, Static

from microserve.services.command.top.screen import Top
from tests.support.command.scripted_server import ScriptedServer, scripted_server
from tests.support.command.view_server import ViewServer

SIZES = [(80, 24), (120, 40)]
WAIT_S = 60.0
P = ParamSpec("P")


def in_a_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        async def go() -> None:
            await test(*arguments, **named)

        asyncio.run(go())

    return run


def text_of(app: Top, name: str) -> str:
    return str(app.query_one(f"#{name}", Static).render())


def table(app: Top) -> list[list[str]]:
    shown = app.query_one("#table", DataTable)
    return [[str(cell) for cell in shown.get_row_at(place)] for place in range(shown.row_count)]


async def until(pilot: Pilot[None], condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await pilot.pause(0.02)


def top(server: ScriptedServer) -> Top:
    return Top(server.endpoint, interval_s=0.2)


@pytest.mark.parametrize("size", SIZES)
@in_a_loop
async def test_from_the_mesh_to_one_request_and_back(size: tuple[int, int]) -> None:
    async with scripted_server(ViewServer().answer) as server:
        app = top(server)
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: len(table(app)) == 2)
            assert "run 4  wait 1  KV 30%  hit 33%  check none yet  alarms 0" in text_of(app, "header")
            assert [row[0] for row in table(app)] == ["e0", "e1"]
            await pilot.press("enter")
            assert "requests e0" in text_of(app, "where")
            assert [row[0] for row in table(app)] == ["r3", "r1"]
            await pilot.press("down", "enter")
            await until(pilot, lambda: "= wall" in text_of(app, "text"))
            assert "500.0 ms" in text_of(app, "text")
            assert "pick any by cost: e0" in text_of(app, "text")
            await pilot.press("escape", "escape")
            assert "mesh" in text_of(app, "where")
            await pilot.press("d")
            assert "address   tcp://127.0.0.1:1" in text_of(app, "text")
            assert app.size.width == size[0]


@in_a_loop
async def test_filter_command_sort_and_keys() -> None:
    async with scripted_server(ViewServer().answer) as server:
        app = top(server)
        async with app.run_test(size=SIZES[0]) as pilot:
            await until(pilot, lambda: len(table(app)) == 2)
            await pilot.press("slash", "e", "1")
            assert [row[0] for row in table(app)] == ["e1"]
            await pilot.press("enter")
            assert "/e1" in text_of(app, "where")
            await pilot.press("escape")
            assert len(table(app)) == 2
            await pilot.press("s", "s", "S")
            assert [row[0] for row in table(app)] == ["e1", "e0"]
            await pilot.press("question_mark")
            assert "freeze" in text_of(app, "text")
            for word, found in (("keys", "team-a"), ("strategies", "auto"), ("requests", "r3")):
                await pilot.press("colon", *word, "enter")
                await until(pilot, lambda: table(app) and table(app)[0][0] == found)  # noqa: B023
            await pilot.press("colon", *"health", "enter")
            assert "alarms    none" in text_of(app, "text")
            await pilot.press("colon", *"nosuch", "enter")
            assert "no command 'nosuch'" in text_of(app, "where")
            assert not app.query_one("#prompt", Input).display
            await pilot.press("q")
        assert app.return_code == 0


@in_a_loop
async def test_frozen_stands_still_and_goes_on() -> None:
    view = ViewServer()
    async with scripted_server(view.answer) as server:
        app = top(server)
        async with app.run_test(size=SIZES[0]) as pilot:
            await until(pilot, lambda: len(table(app)) == 2)
            await pilot.press("space")
            assert "FROZEN" in text_of(app, "header")
            view.engines.pop()
            view.feeds[-1].cut()
            await until(pilot, lambda: len(app.picture.engines) == 1)
            assert len(table(app)) == 2
            await pilot.press("space")
            await until(pilot, lambda: len(table(app)) == 1)
            assert view.feeds[-1].headers["last-event-id"] == "life-1"


@in_a_loop
async def test_a_gateway_that_goes_is_told_and_one_that_comes_back_is_seen() -> None:
    view = ViewServer()
    async with scripted_server(view.answer) as server:
        app = top(server)
        async with app.run_test(size=SIZES[0]) as pilot:
            await until(pilot, lambda: len(table(app)) == 2)
            view.status, view.refusal = 503, "draining"
            view.feeds[-1].cut()
            await until(pilot, lambda: "answers 503: draining" in text_of(app, "header"))
            assert len(table(app)) == 2
            view.status = 200
            await until(pilot, lambda: "STALE" not in text_of(app, "header"))


@in_a_loop
async def test_no_colour_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with scripted_server(ViewServer().answer) as server:
        app = top(server)
        async with app.run_test(size=SIZES[0]) as pilot:
            await until(pilot, lambda: len(table(app)) == 2)
            assert app.no_color
