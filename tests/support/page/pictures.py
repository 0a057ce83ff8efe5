"""The pictures of docs/operations.md, "What the page answers": a real mesh, real traffic, a real browser.

    python -m tests.support.page.pictures [--into docs/img]

A random model of two layers on three engines, three keys, a canary for half of its strategy's requests,
and in the end an engine that is killed. Figures are as they come.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import Locator, Page, expect

from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.page.browser import chromium, opened
from tests.support.process.processes import MeshProcesses

KEYS = {"team-a": 0, "team-b": 400_000, "operator": 0}
"""Tokens a day; 0: no budget."""
TRAFFIC_S = 40.0
MAX_NBYTES = 150_000
WIDTH = 1200
HEADER = "from microserve.services.router.authoring import Chunks, Mesh, Request, strategy\n\n\n@strategy\n"
STABLE = '''async def ours(mesh: Mesh, request: Request) -> Chunks:
    """Prefill on one engine, decode on another."""
    decode = mesh.pick("decode", request)
    prefill = mesh.pick("prefill", request, exclude=[decode])
    grant = await decode.prep_recv(request, end=request.num_tokens)
    sending = prefill.remote_send(request, grant, end=request.num_tokens)
    yield decode.start_generate(request, begin=request.num_tokens, after=sending)
'''
CANARY = '''async def ours(mesh: Mesh, request: Request) -> Chunks:
    """All of it where most of it is cached."""
    yield mesh.pick("decode", request).start_generate(request)
'''


def ask(http: httpx.Client, key: str, number: int, strategy: str, *, long: bool) -> None:
    words = " ".join(f"{number} {place}" for place in range(6))
    shared = "you are a helpful assistant that answers in short sentences. " * (24 if long else 6)
    body = {"model": "tiny", "prompt": shared + words, "max_tokens": 60 if long else 20, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key}", "x-microserve-strategy": strategy}
    http.post("/v1/completions", json=body, headers=headers)


@contextmanager
def traffic(url: str) -> Iterator[threading.Event]:
    """Until the end of the block; team-a asks three times as much. The event: enough has been asked."""
    over, enough = threading.Event(), threading.Event()

    def client(key: str, places: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as http:
            for number in itertools.count():
                if over.is_set():
                    return
                strategy = ("ours", "balanced", "auto", "ours")[number % 4]
                ask(http, key, number * 7 + places, strategy, long=number % 5 == 4)

    threads = [
        threading.Thread(target=client, args=(key, place))
        for place, key in enumerate(("team-a", "team-a", "team-a", "team-b"))
    ]
    timer = threading.Timer(TRAFFIC_S, enough.set)
    for thread in (timer, *threads):
        thread.start()
    try:
        yield enough
    finally:
        over.set()
        timer.cancel()
        for thread in threads:
            thread.join()


def publish(mesh: MeshProcesses, file: Path, text: str, *more: str) -> None:
    file.write_text(HEADER + text)
    words = ["strategy", "publish", str(file), "--index", mesh.index_address, "--no-dry-run", *more]
    subprocess.run([sys.executable, "-P", "-m", "microserve.services", *words], check=True)


class Camera:
    def __init__(self, page: Page, into: Path) -> None:
        self._page, self._into = page, into

    def take(self, name: str, *parts: Locator) -> None:
        """What is from the top of the first of the parts to the end of the last, across the page."""
        boxes = [box for part in parts if (box := part.bounding_box())]
        assert len(boxes) == len(parts), name
        top = boxes[0]["y"] - 8
        height = boxes[-1]["y"] + boxes[-1]["height"] + 8 - top
        clip = {"x": 0.0, "y": top, "width": float(WIDTH), "height": height}
        path = self._into / f"answer-{name}.png"
        self._page.screenshot(path=path, clip=clip, full_page=True)  # type: ignore[arg-type]
        size = path.stat().st_size
        print(f"{path} {size / 1e3:.0f} kB")
        assert size < MAX_NBYTES, f"{path} has {size} bytes"

    def tab(self, name: str) -> None:
        self._page.get_by_role("tab", name=name, exact=True).click()
        self._page.evaluate("scrollTo(0, 0)")


def shoot(page: Page, mesh: MeshProcesses, into: Path) -> None:
    camera = Camera(page, into)
    region = page.get_by_role

    def heading(name: str) -> Locator:
        return page.get_by_role("heading", name=name)

    camera.tab("requests")
    page.get_by_label("order").select_option("slowest")
    ended = region("region", name="Requests that have ended").locator("tbody tr")
    expect(page.get_by_text("are as asked for")).to_be_visible()
    camera.take("cache", heading("Of the last 15 minutes"), ended.nth(6))
    page.get_by_label("strategy", exact=True).fill("balanced")
    page.keyboard.press("Enter")
    expect(page.get_by_text("are as asked for")).to_be_visible()
    ended.filter(has_text="→").first.locator("a").click()
    expect(heading("Where its time went")).to_be_visible()
    camera.take("slow", page.locator("h2").first, region("region", name="Timeline"))
    camera.take("why", heading("Why here"), region("region", name="Candidates of pick").last)
    camera.tab("keys")
    camera.take("keys", heading("Keys").first, region("region", name="API keys"))
    camera.tab("strategies")
    expect(region("region", name="How strategies fare")).to_contain_text("canary")
    of_all = region("region", name="How strategies fare").locator("tbody tr").filter(has_text="all")
    camera.take("canary", heading("Under control"), of_all.nth(3))
    mesh.services["engine-1"].kill()
    camera.tab("mesh")
    row = page.get_by_role("row").filter(has=page.locator("th", has_text="engine-1"))
    expect(row).to_contain_text("lost")
    alarms = region("region", name="What is wrong now")
    expect(alarms).to_contain_text("engine-1")
    camera.take("sick", alarms, region("region", name="Engines of"))


def main(into: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        keys = directory / "keys.toml"
        keys.write_text(
            "".join(
                f'[keys.{name}]\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
                f"daily_token_budget = {budget}\noperator = {str(name == 'operator').lower()}\n"
                for name, budget in KEYS.items()
            )
        )
        settings = ["model.name=tiny", "kvcache.num_blocks=2048", f"gateway.api_keys_file={keys}"]
        settings += [f"index.control_path={directory / 'control.db'}", "bus.heartbeat_interval_s=0.5"]
        model = make_tiny_model(directory / "tiny")
        mesh_directory = directory / "mesh"
        mesh_directory.mkdir()
        with (
            MeshProcesses(model, mesh_directory, num_engines=3, gateway=True, settings=settings) as mesh,
            traffic(mesh.gateway_url) as enough,
            chromium() as browser,
        ):
            publish(mesh, directory / "ours.py", STABLE)
            publish(mesh, directory / "ours.py", CANARY, "--share", "50%")
            enough.wait()
            with opened(browser, mesh.gateway_url, width=WIDTH, errors=True) as page:
                page.get_by_label("API key of an operator").fill("operator")
                page.keyboard.press("Enter")
                expect(page.locator(".link")).to_have_text("live")
                shoot(page, mesh, into)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--into", type=Path, default=Path("docs/img"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(parser.parse_args().into)
