"""A real browser: Debian's Chromium, driven by Playwright, which brings none of its own here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
TIMEOUT_MS = 30_000
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
Scheme = Literal["light", "dark"]


@contextmanager
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--font-render-hinting=none", "--enable-precise-memory-info"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Browser,
    address: str,
    *,
    width: int = 1280,
    scheme: Scheme = "light",
    zoom: int = 1,
    forced_colors: bool = False,
    errors: bool = False,
) -> Iterator[Page]:
    """The page in a context of its own; ``zoom``: as a reader's, for whom there are so many times fewer
    pixels. When it closes, nothing was asked of another origin; and nothing was said on the console, unless
    ``errors`` are to come (of a server that is gone)."""
    context = browser.new_context(
        viewport={"width": width // zoom, "height": 900 // zoom},
        device_scale_factor=zoom,
        forced_colors="active" if forced_colors else "none",
        color_scheme=scheme,
        reduced_motion="reduce",
        locale="en-US",
        timezone_id="UTC",
    )
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    said: list[str] = []
    asked: set[str] = set()
    page.on(
        "console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: said.append(f"raised: {error}"))
    page.on("request", lambda request: asked.add(request.url))
    try:
        page.goto(address)
        yield page
    finally:
        context.close()
    # The browser itself says that an address could not be reached; the page never throws.
    wrong = [each for each in said if not (errors and each.startswith("Failed to load resource"))]
    assert wrong == []
    assert [url for url in asked if not url.startswith(f"{address}/")] == []


def faults(page: Page) -> list[dict[str, Any]]:
    """What axe-core finds wrong, in short."""
    found = Axe().run(
        page, options={"runOnly": {"type": "tag", "values": RULES}, "resultTypes": ["violations"]}
    )
    return [
        {
            "rule": each["id"],
            "nodes": [(node["html"][:160], node["failureSummary"][:300]) for node in each["nodes"][:3]],
        }
        for each in found.response["violations"]
    ]
