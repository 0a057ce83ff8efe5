"""What metrics cost: a scrape of a busy mesh, and counting.

    python benchmarks/mesh/metrics.py [--seconds 20] [--streams 8] [--rounds 9] [--tokens 400] [--json]

Scrapes: two engines (``up`` on the demo model) with streams that never end, every service scraped once a
second by vLLM's names. CPU milliseconds of one scrape as the service itself counts them
(``microserve_metrics_cpu_seconds``), and what share of a core that is where somebody scrapes every 15 s.

Counting: an engine's core over a runner that computes nothing, 16 sequences, with its tally and with one that
counts nothing, in turns in this process; CPU microseconds a token, medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import structlog
from control_parts.instant_engine import make_core
from prometheus_client.parser import text_string_to_metric_families

from microserve.protocol.messages.engine import StartGenerate
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.metrics.histogram import Histogram
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.core.measure.tally import Tally
from microserve.services.local.demo.model import default_cache, fetch
from microserve.services.local.metric_ports import TARGETS

SCRAPE_S = 15.0
"""Prometheus' usual interval."""
GOAL_PERCENT = 1.0
NUM_SEQUENCES = 16
FREE = ["index.address=tcp://127.0.0.1:0", "router.address=tcp://127.0.0.1:0", "gateway.port=0"]


# --- scrapes -----------------------------------------------------------------------------------------


@contextmanager
def mesh(model: str) -> Iterator[dict[str, str]]:
    """Addresses by service."""
    microserve = [sys.executable, "-P", "-m", "microserve.services"]
    settings = [
        word for each in (*FREE, f"model.path={model}", "model.name=demo") for word in ("--set", each)
    ]
    with tempfile.TemporaryDirectory(prefix="metrics-") as home:
        where = ["--directory", f"{home}/mesh"]
        subprocess.run([*microserve, "up", "--detach", "--no-demo", *where, *settings], check=True, cwd=home)
        try:
            groups = json.loads(Path(home, "mesh", TARGETS).read_text())
            yield {group["labels"]["id"]: group["targets"][0] for group in groups}
        finally:
            subprocess.run([*microserve, "down", *where], check=True, cwd=home)


async def scrapes(seconds: float, streams: int) -> dict[str, dict[str, float]]:
    """CPU milliseconds a scrape, by service."""
    model = fetch(default_cache({}), lambda what, part: None)
    with mesh(str(model)) as targets:
        async with httpx.AsyncClient(timeout=120) as http:
            busy = [asyncio.create_task(ask(http, targets["gateway"], number)) for number in range(streams)]
            before = {name: await look(http, address) for name, address in targets.items()}
            ends, num_scrapes = time.monotonic() + seconds, 0
            while time.monotonic() < ends:
                await asyncio.sleep(1.05)  # a text is kept for a second
                num_scrapes += 1
                after = {name: await look(http, address) for name, address in targets.items()}
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)
    return {
        name: {
            part: (after[name][part] - before[name][part]) * 1e3 / num_scrapes for part in ("copy", "text")
        }
        | {"kb": after[name]["nbytes"] / 1e3}
        for name in targets
    }


async def ask(http: httpx.AsyncClient, gateway: str, number: int) -> None:
    while True:
        body = {
            "model": "demo",
            "prompt": [1 + number, *range(100, 300)],
            "max_tokens": 64,
            "ignore_eos": True,
        }
        (await http.post(f"http://{gateway}/v1/completions", json=body)).raise_for_status()


async def look(http: httpx.AsyncClient, address: str) -> dict[str, float]:
    text = (await http.get(f"http://{address}/metrics?names=vllm")).raise_for_status().text
    found = {"copy": 0.0, "text": 0.0, "nbytes": float(len(text))}
    for family in text_string_to_metric_families(text):
        if family.name == "microserve_metrics_cpu_seconds":
            found |= {sample.labels["part"]: sample.value for sample in family.samples}
    return found


# --- counting ----------------------------------------------------------------------------------------


class _Uncounted(Histogram):
    __slots__ = ()

    def observe(self, number: float) -> None: ...


class Uncounted(Tally):
    """Counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inter_token = _Uncounted(self.inter_token.bounds)

    def stepped(self, *_: object) -> None: ...
    def began(self, *_: object) -> None: ...
    def ended(self, *_: object) -> None: ...


def counting(rounds: int, tokens: int) -> dict[str, float]:
    """CPU microseconds a token."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    found: dict[str, list[float]] = {"on": [], "off": []}
    for number in range(rounds + 1):
        for name, tally in (("on", Tally()), ("off", Uncounted())):
            took = generate(tally, tokens)
            if number:  # the first is for warmth
                found[name].append(took)
    return {name: statistics.median(each) for name, each in found.items()}


def generate(tally: Tally, tokens: int) -> float:
    settings = load_settings(
        None,
        environment={},
        overrides=["model.name=m", "engine.id=e", "kvcache.num_blocks=4096", "engine.max_num_seqs=64"],
    )
    core = make_core(settings, 0.0)
    core.state.tally = tally
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for number in range(NUM_SEQUENCES):
        message = StartGenerate(number, f"r{number}", 0, params, 600.0)
        core.actions.start_generate(b"router", message, list(range(32)), core.clock())
    began = time.process_time()
    while core.step():
        core.take_output()
    took_s = time.process_time() - began
    core.close()
    return took_s * 1e6 / (NUM_SEQUENCES * tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    costs, tokens = (
        asyncio.run(scrapes(options.seconds, options.streams)),
        counting(options.rounds, options.tokens),
    )
    if options.json:
        print(json.dumps({"scrapes": costs, "counting": tokens}))
        return
    print(
        "| service | text, kB | copied in the loop, CPU ms | made beside it, CPU ms | % of a core at 15 s |"
    )
    print("|---|---|---|---|---|")
    for name, cost in costs.items():
        share = (cost["copy"] + cost["text"]) / 10 / SCRAPE_S
        print(f"| {name} | {cost['kb']:.0f} | {cost['copy']:.2f} | {cost['text']:.1f} | {share:.3f} |")
    print(f"\na goal of {GOAL_PERCENT:g} % of a core")
    on, off = tokens["on"], tokens["off"]
    print(f"a token: {on:.2f} us of CPU with counting, {off:.2f} without: {on - off:+.2f}")


if __name__ == "__main__":
    main()
