"""The page and its connection: a key, a server that dies and comes back, a pause, the keyboard alone."""

from __future__ import annotations

import os
import time

import pytest
from playwright.sync_api import Browser, CDPSession, Page, expect

from tests.page.test_views import VIEWS, go, planted
from tests.support.page.browser import faults, opened
from tests.support.page.planted import KEY, Planted
from tests.support.page.scenes import busy

SOAK_S = float(os.environ.get("MICROSERVE_PAGE_SOAK_S", "15"))


def test_a_key_is_asked_for_and_kept_by_the_tab(browser: Browser) -> None:
    with planted(busy(), needs_key=True) as server, opened(browser, server.address, errors=True) as page:
        field = page.get_by_label("API key of an operator")
        expect(page.get_by_role("alert")).to_contain_text("This gateway has keys")
        assert faults(page) == []
        field.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("a key is needed")
        field.fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator(".link")).to_have_text("live")
        page.reload()
        expect(page.locator(".link")).to_have_text("live")
        assert page.evaluate("localStorage.length") == 0 and KEY not in page.url
        page.get_by_role("button", name="Forget key").click()
        expect(field).to_be_visible()


def test_a_server_that_dies_and_comes_back(browser: Browser) -> None:
    server = Planted(busy())
    try:
        with opened(browser, server.address, errors=True) as page:
            expect(page.locator(".link")).to_have_text("live")
            server.stop()
            expect(page.get_by_role("status")).to_have_text("connection lost, trying again")
            expect(page.locator(".stale")).to_contain_text("stale")
            expect(page.get_by_text("e1", exact=False).first).to_be_visible()  # what was known stays
            server.start()
            expect(page.locator(".link")).to_have_text("live")
            expect(page.locator(".stale")).to_have_count(0)
        assert server.came_back_with[0] == "" and server.came_back_with[-1].startswith("life-")
    finally:
        server.stop()


def test_a_pause_holds_the_picture(browser: Browser) -> None:
    with planted(busy()) as server, opened(browser, server.address) as page:
        go(page, "requests")
        newest = page.get_by_role("region", name="Requests that have ended").locator("tbody th").first
        expect(newest).to_contain_text("new-")
        button = page.get_by_role("button", name="Pause")
        button.click()
        expect(page.get_by_role("status")).to_have_text("paused")
        expect(button).to_have_attribute("aria-pressed", "true")
        held = newest.text_content()
        page.wait_for_timeout(1000)  # several deltas would have come
        assert newest.text_content() == held
        button.click()
        expect(newest).not_to_have_text(held or "")


def focused(page: Page) -> str:
    name: str = page.evaluate("document.activeElement.textContent.slice(0, 40)")
    return name


def test_the_keyboard_alone(browser: Browser) -> None:
    with planted(busy()) as server, opened(browser, server.address) as page:
        expect(page.locator(".link")).to_have_text("live")
        for _ in range(2):
            page.keyboard.press("Tab")
        assert focused(page) == "mesh"
        for key, name in (
            ("ArrowRight", "requests"),
            ("End", "try"),
            ("ArrowRight", "mesh"),
            ("ArrowLeft", "try"),
            ("Home", "mesh"),
        ):
            page.keyboard.press(key)
            assert focused(page) == name
            expect(page.get_by_role("tab", selected=True)).to_have_text(name)
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", "the focus is seen"
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("heading", level=2, name="Requests")).to_be_visible()
        for _ in range(40):  # by Tab alone to the first request
            page.keyboard.press("Tab")
            if focused(page).startswith("http-"):
                break
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=2, name="Request request-10000")).to_be_visible()


def size_of(session: CDPSession) -> dict[str, float]:
    """Bytes of JavaScript's heap, nodes and listeners, as they are when nothing is left to be collected."""
    session.send("HeapProfiler.collectGarbage")
    counted = session.send("Memory.getDOMCounters")
    used: float = session.send("Runtime.getHeapUsage")["usedSize"]
    return {"heap": used, "nodes": counted["nodes"], "listeners": counted["jsEventListeners"]}


@pytest.mark.timeout(0)
def test_a_page_that_stays_open_does_not_grow(browser: Browser) -> None:
    """From view to view over a busy mesh, for ``MICROSERVE_PAGE_SOAK_S``; it is as large as after its first
    rounds, when all that it keeps is full."""
    rounds: list[dict[str, float]] = []
    with planted(busy(16, 2000)) as server, opened(browser, server.address) as page:
        expect(page.locator(".link")).to_have_text("live")
        session = page.context.new_cdp_session(page)
        over = time.monotonic() + SOAK_S
        while time.monotonic() < over or len(rounds) < 4:
            for view in VIEWS:
                go(page, view)
                page.wait_for_timeout(500)
            go(page, "mesh")
            rounds.append(size_of(session))
    first, last = rounds[:2], rounds[-2:]
    print(f"{len(rounds)} rounds: {first} at first, {last} at last")
    for name, spared in (("heap", 2e6), ("nodes", 300.0), ("listeners", 30.0)):
        before, after = (max(each[name] for each in those) for those in (first, last))
        assert after <= 1.25 * before + spared, (name, rounds)
