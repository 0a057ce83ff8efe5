"""What it costs to see everything: two meshes, one with all of it on and one with all of it off, in turns.

    python benchmarks/mesh/seeing.py [--rounds 12] [--streams 8] [--tokens 64] [--pairs 400] [--json]

On: the ports of metrics, all of them scraped by vLLM's names every ``--scrape-s`` seconds; the page's feed,
read by somebody; traces, sent by OTLP to a collector that drops them; the self-check, every ten seconds. Off:
none of it. Both meshes stay up and take turns; which of them goes first alternates. Two models, two meshes of
each:

    tokens/s     of the demo model's streams at once, half of them by two engines, round by round
    CPU          of all services for an output token of those
    p50          of a request of one token, a small random model, one at a time, in pairs; the interval is
                 that of the median of the differences, 95 %, by ranks

What looks (scraper, reader of the feed, collector) shares the two cores, as nothing would on other hosts.
Goals: at most 2 % of the tokens a second and 0.1 ms of the p50.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
from control_parts.sides import Side, ask_alone, mesh, play

from microserve.services.local.demo.model import default_cache, fetch
from microserve.services.local.metric_ports import TARGETS

MAKE_TINY = Path(__file__).parents[2] / "tests/support/engine/model/tiny_model.py"
OFF = ("mesh.metrics=false", "router.check_interval_s=0")
GOAL_SHARE, GOAL_MS = 0.98, 0.1
COLLECTOR = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Drop(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Drop)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@contextmanager
def collector() -> Iterator[dict[str, str]]:
    """The environment that sends traces to it."""
    child = subprocess.Popen([sys.executable, "-c", COLLECTOR], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        endpoint = f"http://127.0.0.1:{int(child.stdout.readline())}"
        yield {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    finally:
        child.kill()
        child.wait()


@contextmanager
def looked_at(side: Side, scrape_s: float) -> Iterator[None]:
    """By a scraper and by a page."""
    over = threading.Event()

    def scrape() -> None:
        groups = json.loads((side.directory / TARGETS).read_text())
        urls = [f"http://{target}/metrics?names=vllm" for group in groups for target in group["targets"]]
        while not over.wait(scrape_s):
            for url in urls:
                with urllib.request.urlopen(url, timeout=60) as answer:
                    answer.read()

    def read() -> None:
        with suppress(httpx.HTTPError), httpx.stream("GET", f"{side.url}/view/feed", timeout=None) as feed:
            for _ in feed.iter_raw():
                if over.is_set():
                    return

    threads = [threading.Thread(target=each, daemon=True) for each in (scrape, read)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(10)


@contextmanager
def sides(model: str, scrape_s: float) -> Iterator[tuple[Side, Side]]:
    """Off and on."""
    with ExitStack() as stack:
        environment = stack.enter_context(collector())
        off = stack.enter_context(mesh(model, *OFF))
        on = stack.enter_context(mesh(model, "router.check_interval_s=10", environment=environment))
        stack.enter_context(looked_at(on, scrape_s))
        yield off, on


async def pairs(off: Side, on: Side, count: int) -> None:
    async with httpx.AsyncClient(timeout=600.0) as client:
        for number in range(-20, count):
            for side in (off, on) if number % 2 else (on, off):
                await ask_alone(client, side, number)
            if number < 0:
                off.forget()
                on.forget()


def median_of(values: Sequence[float]) -> list[float]:
    """With the interval in which the true one lies in 95 of 100 cases, by ranks."""
    ranked = sorted(values)
    cut = max(0, math.floor(len(ranked) / 2 - 0.98 * math.sqrt(len(ranked))))
    return [round(each, 4) for each in (statistics.median(ranked), ranked[cut], ranked[-1 - cut])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--scrape-s", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with sides(str(fetch(default_cache(os.environ), lambda what, part: None)), options.scrape_s) as (off, on):
        for number in range(-1, options.rounds):
            for side in (off, on) if number % 2 else (on, off):
                asyncio.run(play(side, number, options.streams, options.tokens))
            if number < 0:
                off.forget()
                on.forget()
        told = {
            "tokens_per_s": [statistics.median(off.rates), statistics.median(on.rates)],
            "share": median_of([b / a for a, b in zip(off.rates, on.rates, strict=True)]),
            "cpu_ms": [statistics.median(off.cpu_ms), statistics.median(on.cpu_ms)],
        }
    with tempfile.TemporaryDirectory(prefix="seeing-") as home:
        tiny = str(Path(home) / "tiny")
        subprocess.run([sys.executable, str(MAKE_TINY), tiny], check=True, stdout=subprocess.DEVNULL)
        with sides(tiny, options.scrape_s) as (off, on):
            asyncio.run(pairs(off, on, options.pairs))
            told |= {
                "p50_ms": [statistics.median(off.alone_ms), statistics.median(on.alone_ms)],
                "more_ms": median_of([b - a for a, b in zip(off.alone_ms, on.alone_ms, strict=True)]),
            }
    if options.json:
        print(json.dumps(told))
        return
    for name, (without, with_all) in (
        (each, told[each][:2]) for each in ("tokens_per_s", "cpu_ms", "p50_ms")
    ):
        print(f"{name:<14} off {without:9.3f}   on {with_all:9.3f}")
    share, more = told["share"], told["more_ms"]
    print(f"share of tokens/s {share[0]:.3f} ({share[1]:.3f}-{share[2]:.3f}), goal {GOAL_SHARE:g}")
    print(f"p50 more, ms {more[0]:.3f} ({more[1]:.3f}-{more[2]:.3f}), goal {GOAL_MS:g}")


if __name__ == "__main__":
    main()
