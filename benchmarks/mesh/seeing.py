"""What it costs to see everything: two meshes, one with all of it on and one with all of it off, in turns.

    python benchmarks/mesh/seeing.py [--lives 2,6] [--rounds 12] [--pairs 400] [--same] [--json]

On: the ports of metrics, all of them scraped by vLLM's names every ``--scrape-s`` seconds; the page's feed,
read by somebody; traces, sent by OTLP to a collector that drops them; the self-check, every ``--check-s``
(60, as in any mesh). Off: none of it. Both meshes stay up and take turns; which of them goes first
alternates, as does which is started first. Two models, two meshes of each:

    tokens/s     of the demo model's streams at once, half of them by two engines, round by round
    CPU          of all services for an output token of those
    p50          of a request of one token, a small random model, one at a time, in pairs
    a trace      what one more costs such a request: in the mesh with all of it on, traced or not, in pairs

Two meshes that are made alike are not alike: where their memory came to lie makes one of them faster by more
than what is measured here, for as long as both live. So meshes are made anew, ``--lives`` of each model, and
``--rounds`` and ``--pairs`` are shared out among them. What is told of the p50 is the mean over lives of the
median of the differences, its interval by Student's t, 95 %; all else are medians of rounds or pairs, their
intervals by ranks. ``--same`` is the control: both are off.

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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
from control_parts.interval import mean_of, median_of
from control_parts.sides import Side, ask_alone, mesh, play

from microserve.protocol.tracing.traceparent import make
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
def sides(model: str, options: argparse.Namespace, life: int) -> Iterator[tuple[Side, Side]]:
    """Off and on, for one life."""
    with ExitStack() as stack:
        environment = stack.enter_context(collector())

        def off() -> Side:
            return stack.enter_context(mesh(model, *OFF))

        def on() -> Side:
            if options.same:
                return off()
            side = stack.enter_context(
                mesh(model, f"router.check_interval_s={options.check_s}", environment=environment)
            )
            stack.enter_context(looked_at(side, options.scrape_s))
            return side

        made = {each: each() for each in ((off, on) if life % 2 else (on, off))}
        yield made[off], made[on]


async def pairs(off: Side, on: Side, count: int) -> None:
    async with httpx.AsyncClient(timeout=600.0) as client:
        for number in range(-20, count):
            for side in (off, on) if number % 2 else (on, off):
                await ask_alone(client, side, number)
            if number < 0:
                off.forget()
                on.forget()


async def traced_or_not(side: Side, count: int) -> tuple[list[float], list[float]]:
    """Requests whose client records their trace, and others, in milliseconds; first those without."""
    found: tuple[list[float], list[float]] = ([], [])
    async with httpx.AsyncClient(timeout=600.0) as client:
        for number in range(-20, count):
            for is_sampled in (False, True) if number % 2 else (True, False):
                side.forget()
                await ask_alone(client, side, number, make(is_sampled=is_sampled).text)
                if number >= 0:
                    found[is_sampled].extend(side.alone_ms)
    return found


def streams_at_once(options: argparse.Namespace, lives: int) -> dict[str, list[float]]:
    """Tokens a second and CPU, of the demo model."""
    model = str(fetch(default_cache(os.environ), lambda what, part: None))
    rates: tuple[list[float], list[float]] = ([], [])
    cpu_ms: tuple[list[float], list[float]] = ([], [])
    for life in range(lives):
        with sides(model, options, life) as both:
            for number in range(-1, math.ceil(options.rounds / lives)):
                for side in both if number % 2 else both[::-1]:
                    asyncio.run(play(side, number, options.streams, options.tokens))
                if number < 0:
                    for side in both:
                        side.forget()
            for index, side in enumerate(both):
                rates[index].extend(side.rates)
                cpu_ms[index].extend(side.cpu_ms)
    return {
        "tokens_per_s": [statistics.median(each) for each in rates],
        "share": median_of([on / off for off, on in zip(*rates, strict=True)]),
        "cpu_ms": [statistics.median(each) for each in cpu_ms],
    }


def one_at_a_time(options: argparse.Namespace, lives: int) -> dict[str, list[float]]:
    """Latency, of a small random model."""
    alone_ms: tuple[list[float], list[float]] = ([], [])
    more_ms: list[float] = []
    trace_ms: list[float] = []
    with tempfile.TemporaryDirectory(prefix="seeing-") as home:
        tiny = str(Path(home) / "tiny")
        subprocess.run([sys.executable, str(MAKE_TINY), tiny], check=True, stdout=subprocess.DEVNULL)
        for life in range(lives):
            with sides(tiny, options, life) as (off, on):
                asyncio.run(pairs(off, on, math.ceil(options.pairs / lives)))
                for index, side in enumerate((off, on)):
                    alone_ms[index].extend(side.alone_ms)
                more_ms.append(
                    statistics.median(b - a for a, b in zip(off.alone_ms, on.alone_ms, strict=True))
                )
                without, traced = asyncio.run(traced_or_not(on, math.ceil(options.pairs / lives)))
                trace_ms += [b - a for a, b in zip(without, traced, strict=True)]
    return {
        "p50_ms": [statistics.median(each) for each in alone_ms],
        "more_ms": mean_of(more_ms),
        "trace_ms": median_of(trace_ms),
        "more_ms_by_life": [round(each, 3) for each in more_ms],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--lives", default="2,6", help="of the two meshes of each model")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--scrape-s", type=float, default=5.0)
    parser.add_argument("--check-s", type=float, default=60.0)
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lives = [int(each) for each in options.lives.split(",")]
    told: dict[str, list[float]] = {}
    for measure, count in zip((streams_at_once, one_at_a_time), lives, strict=True):
        if count:
            told |= measure(options, count)
    if options.json:
        print(json.dumps(told))
        return
    for name in ("tokens_per_s", "cpu_ms", "p50_ms"):
        if name in told:
            print(f"{name:<14} off {told[name][0]:9.3f}   on {told[name][1]:9.3f}")
    if "share" in told:
        print("share of tokens/s {:.3f} ({:.3f}-{:.3f})".format(*told["share"]), f"goal {GOAL_SHARE:g}")
    if "more_ms" in told:
        print("a trace more, ms {:.3f} ({:.3f}-{:.3f})".format(*told["trace_ms"]))
        by_life = ", ".join(f"{each:.3f}" for each in told["more_ms_by_life"])
        print("p50 more, ms {:.3f} ({:.3f}-{:.3f})".format(*told["more_ms"]), f"goal {GOAL_MS:g}; {by_life}")


if __name__ == "__main__":
    main()
