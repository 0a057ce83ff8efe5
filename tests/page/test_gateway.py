"""The page as a real gateway serves it: a prompt is asked and its timeline is what the browser saw."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.support.gateway.gateway_world import Served, make_model
from tests.support.gateway.living import Living
from tests.support.page.browser import faults, opened
from tests.support.process.processes import MeshProcesses


def answer(served: Served) -> None:
    served.send([7] * 4)
    served.end()


def test_a_gateway_that_is_killed_and_comes_back(browser: Browser, tiny_model: Path, tmp_path: Path) -> None:
    """A new process is another life: the page gets a snapshot of it, and goes on."""
    settings = ["model.name=tiny"]
    with (
        MeshProcesses(tiny_model, tmp_path, num_engines=0, gateway=True, settings=settings) as mesh,
        opened(browser, mesh.gateway_url, errors=True) as page,
    ):
        expect(page.locator(".link")).to_have_text("live")
        for _ in range(2):
            mesh.services["gateway"].kill()
            expect(page.get_by_role("status")).to_have_text("connection lost, trying again")
            expect(page.locator(".stale")).to_contain_text("stale")
            mesh.start("gateway")
            expect(page.locator(".link")).to_have_text("live")
            expect(page.locator(".stale")).to_have_count(0)
        page.get_by_role("tab", name="health").click()
        expect(page.get_by_role("region", name="Alarms")).to_contain_text("gateway.not_ready")


def test_a_prompt_is_tried_and_taken_apart(browser: Browser, tmp_path: Path) -> None:
    # /view/strategies is the index's, and there is none here: the browser says so.
    with (
        contextlib.closing(Living(make_model(tmp_path), answer=answer)) as living,
        opened(browser, living.address, errors=True) as page,
    ):
        expect(page.locator(".link")).to_have_text("live")
        page.get_by_role("tab", name="try").click()
        page.get_by_label("prompt").fill("hello mesh")
        page.get_by_label("strategy (empty: the default)").fill("balanced")
        page.get_by_role("button", name="Ask").click()
        expect(page.get_by_text("answered within")).to_be_visible()
        total = page.locator("[data-sum]")
        expect(total).to_be_visible()
        parts = [float(total.get_attribute(name) or "nan") for name in ("data-sum", "data-wall")]
        assert parts[0] == pytest.approx(parts[1], abs=1e-6)
        assert [each.message.strategy for each in living.served()] == ["balanced"]
        assert faults(page) == []
        page.get_by_role("tab", name="requests").click()
        expect(page.get_by_role("region", name="Requests that have ended").locator("tbody a")).to_have_count(
            1
        )
