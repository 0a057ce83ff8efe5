"""Every view in every state, light and dark, wide and narrow: whole, accessible, and quiet on the console."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.page.browser import Scheme, faults, opened
from tests.support.page.planted import Planted
from tests.support.page.scenes import HOSTILE, PHASES, SCENES, Scene, busy, engine_dead, many_engines

VIEWS = {
    "mesh": "Mesh",
    "requests": "Requests",
    "requests/request-1": "Request request-1",
    "strategies": "Strategies",
    "keys": "Keys",
    "health": "Health",
    "try": "Try a prompt",
}


@contextlib.contextmanager
def planted(scene: Scene, *, needs_key: bool = False) -> Iterator[Planted]:
    server = Planted(scene, needs_key=needs_key)
    try:
        yield server
    finally:
        server.stop()


def go(page: Page, view: str) -> None:
    page.evaluate("view => { location.hash = `#/${view}` }", view)
    expect(page.get_by_role("heading", level=2, name=VIEWS[view], exact=True)).to_be_visible()


@pytest.mark.parametrize("width", (1280, 390))
@pytest.mark.parametrize("scheme", ("light", "dark"))
@pytest.mark.parametrize("name", SCENES)
def test_every_view_in_every_state(browser: Browser, name: str, scheme: Scheme, width: int) -> None:
    is_quiet = name not in ("feed lost", "empty")  # there the browser says itself what it could not load
    with (
        planted(SCENES[name]()) as server,
        opened(browser, server.address, width=width, scheme=scheme, errors=not is_quiet) as page,
    ):
        if name == "feed lost":
            expect(page.locator(".link")).to_contain_text("connection lost")
            expect(page.locator(".stale")).to_contain_text("stale")
        else:
            expect(page.locator(".link")).to_have_text("live")
        for view in VIEWS:
            go(page, view)
            expect(page.get_by_text("nothing has been heard")).to_have_count(0)
            assert faults(page) == [], view
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{view} is {wide} px wide: tables scroll by themselves"


def test_twice_as_large_all_of_it_is_read_without_scrolling_sideways(browser: Browser) -> None:
    with (
        planted(engine_dead()) as server,
        opened(browser, server.address, zoom=2) as page,
    ):
        expect(page.locator(".link")).to_have_text("live")
        for view in VIEWS:
            go(page, view)
            assert faults(page) == [], view
            assert page.evaluate("document.documentElement.scrollWidth") <= 640, view


def test_colours_of_the_reader_hide_nothing(browser: Browser) -> None:
    """States are shapes and words, drawings keep their colours and have an edge, what is chosen is seen."""
    with (
        planted(engine_dead()) as server,
        opened(browser, server.address, forced_colors=True) as page,
    ):
        expect(page.locator(".link")).to_have_text("live")
        assert page.evaluate("matchMedia('(forced-colors: active)').matches")
        for view in VIEWS:
            go(page, view)
            assert faults(page) == [], view
        go(page, "mesh")
        expect(page.get_by_text("✕ lost").first).to_be_visible()
        style = "each => getComputedStyle(each)"
        fills = page.locator(".part").evaluate_all(f"all => all.map({style}).map(each => each.fill)")
        assert len(set(fills)) > 2, "blocks of each kind have a colour of their own"
        edges = page.locator(".part").evaluate_all(f"all => all.map({style}).map(each => each.stroke)")
        assert "none" not in edges
        chosen = page.get_by_role("tab", selected=True).evaluate(f"each => ({style})(each).borderTopWidth")
        assert chosen == "2px"


def test_a_head_by_which_rows_are_ordered_says_so(browser: Browser) -> None:
    with planted(busy()) as server, opened(browser, server.address) as page:
        go(page, "requests")
        ended = page.get_by_role("region", name="Requests that have ended")
        ordered = ended.locator('th[aria-sort="descending"]')
        expect(ordered).to_have_text("ended ▼")
        with page.expect_request(lambda request: "order=slowest" in request.url):
            ended.get_by_role("button", name="wall time").press("Enter")
        expect(ordered).to_have_text("wall time ▼")
        expect(page.get_by_label("order")).to_have_value("slowest")
        page.get_by_label("order").select_option("first_token")
        expect(ordered).to_have_text("first token ▼")
        assert faults(page) == []


def test_the_phases_of_a_request_add_up_and_it_says_why(browser: Browser) -> None:
    with planted(busy()) as server, opened(browser, server.address) as page:
        go(page, "requests/request-1")
        table = page.get_by_role("region", name="Timeline").locator("tbody tr")
        expect(table).to_have_count(len(PHASES))
        total = page.locator("[data-sum]")
        parts = [float(total.get_attribute(name) or "nan") for name in ("data-sum", "data-wall")]
        assert parts[0] == pytest.approx(parts[1]) and parts[1] == pytest.approx(2 * sum(PHASES.values()))
        expect(page.get_by_text("e0, chosen").first).to_be_visible()
        expect(page.get_by_text("Attempt 2: balanced v3")).to_be_visible()
        expect(page.get_by_text("64 to 192").first).to_be_visible()
        assert page.get_by_text(HOSTILE).count() and page.locator("img").count() == 0


def test_requests_are_filtered(browser: Browser) -> None:
    with planted(busy()) as server, opened(browser, server.address) as page:
        go(page, "requests")
        with page.expect_request(lambda request: "min_s=1.5" in request.url and "limit=100" in request.url):
            page.get_by_label("at least, s").fill("1.5")
            page.keyboard.press("Enter")
        with page.expect_request(lambda request: "order=slowest" in request.url):
            page.get_by_label("order").select_option("slowest")
        expect(page.get_by_text("are as asked for, of 301 that are kept")).to_be_visible()


def test_an_engine_that_is_gone_says_why_by_shape_and_word(browser: Browser) -> None:
    with planted(engine_dead()) as server, opened(browser, server.address) as page:
        row = page.get_by_role("row").filter(has=page.locator("th", has_text="e2"))
        expect(row).to_contain_text("✕ lost")
        expect(row).to_contain_text("it has said nothing for 12 s")
        expect(page.get_by_role("region", name="What is wrong now")).to_contain_text("2 alarms")


def test_64_engines_and_10000_requests_stay_fluid(browser: Browser) -> None:
    """Rows are bounded, and so is what is drawn at once."""
    with planted(many_engines()) as server, opened(browser, server.address) as page:
        expect(page.get_by_role("region", name="Engines of").locator("tbody tr")).to_have_count(64)
        page.get_by_text("4,032 pairs").click()
        expect(page.get_by_text("3,932 more are not drawn")).to_be_visible()
        go(page, "requests")
        page.get_by_label("order").select_option("slowest")
        ended = page.get_by_role("region", name="Requests that have ended").locator("tbody tr")
        expect(ended).to_have_count(100)
        expect(page.get_by_text("900 more are not drawn")).to_be_visible()
        assert page.evaluate("document.querySelectorAll('*').length") < 5000
