"""What gateway, router and an engine's shell cost a request and a token, over engines that answer at once.

    python benchmarks/mesh/control_plane.py [--rounds 5] [--before CHECKOUT] [--locked] [--chat] [--json]
    python benchmarks/mesh/control_plane.py --beside router.record_requests=0

    alone   one request in flight (2,000 characters, 4 tokens out): ms, beside a server that does nothing
    busy    the same, 16 in flight: requests a second
    paced   16 streams, and steps of 16 ms, so that each token is an event of its own

Each with the CPU time of every process, which a busy machine leaves comparable: wall times here are not. All
sides stay up and take turns, and which goes first alternates. ``--before``: another checkout's services as a
second side; ``--beside``: these with another setting. ``--locked``: all sockets have keys (CURVE), as under
``microserve up``. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field

import uvloop
from control_parts.client import drive, prompts, request
from control_parts.mesh import KINDS, Mesh, bare, mesh

from microserve.services.local.demo.model import default_cache, fetch

PROMPT_CHARS, OUTPUT_TOKENS = 2000, 4
NUM_ALONE, NUM_BUSY, AT_ONCE = 100, 400, 16
NUM_STREAMS, STREAM_TOKENS = 16, 192
STEP_S = 0.016
"""Of a paced engine: longer than all that the control plane does in it, so that no tokens merge."""


@dataclass
class Side:
    name: str
    quick: Mesh
    paced: Mesh
    figures: dict[str, list[float]] = field(default_factory=dict)
    """By name, one a round."""

    def take(self, **figures: float) -> None:
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.figures[name])


def bodies(seed: int, count: int, *, chat: bool) -> list[bytes]:
    made = []
    for _, prompt in zip(range(count), prompts(seed, PROMPT_CHARS), strict=False):
        body: dict[str, object] = {"model": "bench", "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
        if chat:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        made.append(request("/v1/chat/completions" if chat else "/v1/completions", body))
    return made


async def play_quick(side: Side, name: str, contents: list[bytes], at_once: int) -> None:
    before = side.quick.cpu_s()
    took_s, answers, all_s = await drive(side.quick.url, contents, at_once)
    after = side.quick.cpu_s()
    if not all(b'"completion_tokens":%d,' % OUTPUT_TOKENS in answer for answer in answers):
        raise RuntimeError("an answer is not whole")
    side.take(**{f"{name}_p50_ms": statistics.median(took_s) * 1000, f"{name}_per_s": len(contents) / all_s})
    side.take(**{f"{name}_{kind}_us": (after[kind] - before[kind]) / len(contents) * 1e6 for kind in before})


async def play_paced(side: Side) -> None:
    body = {
        "model": "bench",
        "prompt": "a b c",
        "max_tokens": STREAM_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    contents = [request("/v1/completions", body) for _ in range(NUM_STREAMS)]
    before = side.paced.cpu_s()
    _, answers, all_s = await drive(side.paced.url, contents, NUM_STREAMS)
    after = side.paced.cpu_s()
    count = NUM_STREAMS * STREAM_TOKENS
    num_events = sum(answer.count(b'"text":"') for answer in answers)
    side.take(
        paced_tokens_per_s=count / all_s,
        paced_events_a_token=num_events / count,
        # A machine so busy that tokens merge all the same must not look as if they were cheaper.
        **{f"paced_{kind}_us": (after[kind] - before[kind]) / num_events * 1e6 for kind in before},
    )


def play(sides: list[Side], direct: str, number: int, *, chat: bool, scale: float) -> list[float]:
    """One round of all sides; seconds of the requests to the server that does nothing."""
    num_alone, num_busy = max(8, int(NUM_ALONE * scale)), max(AT_ONCE, int(NUM_BUSY * scale))
    direct_s, _, _ = asyncio.run(drive(direct, bodies(number, num_alone, chat=chat), 1))
    for side in sides if number % 2 else reversed(sides):
        run = [bodies(1000 + number, num_alone, chat=chat), bodies(2000 + number, num_busy, chat=chat)]
        asyncio.run(play_quick(side, "alone", run[0], 1))
        asyncio.run(play_quick(side, "busy", run[1], AT_ONCE))
        asyncio.run(play_paced(side))
    return direct_s


def rows(sides: list[Side], direct_ms: float) -> list[tuple[str, list[float]]]:
    table = [("one request alone, added ms (p50)", [s.median("alone_p50_ms") - direct_ms for s in sides])]
    table += [("requests/s, 16 in flight", [s.median("busy_per_s") for s in sides])]
    for name, what in (
        ("alone", "request, alone"),
        ("busy", "request, 16 in flight"),
        ("paced", "token, paced"),
    ):
        table += [
            (f"CPU us a {what}: {kind}", [s.median(f"{name}_{kind}_us") for s in sides]) for kind in KINDS[:3]
        ]
        both = [s.median(f"{name}_gateway_us") + s.median(f"{name}_router_us") for s in sides]
        table.append((f"CPU us a {what}: gateway + router", both))
    table += [("tokens/s, paced", [s.median("paced_tokens_per_s") for s in sides])]
    table += [("events a token, paced", [s.median("paced_events_a_token") for s in sides])]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Whose tokenizer it is; default: the demo model.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="Of the numbers of requests in a round.")
    parser.add_argument("--before", default="", metavar="CHECKOUT")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="A side with this setting.",
    )
    parser.add_argument("--locked", action="store_true")
    parser.add_argument("--chat", action="store_true", help="Conversations: the chat template as well.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    options = parser.parse_args()
    model = options.model or str(fetch(default_cache(os.environ), lambda what, part: None))
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    with ExitStack() as stack:
        direct = stack.enter_context(bare())
        wanted = [("before", options.before, [])] if options.before else []
        wanted += [("beside", "", options.beside)] if options.beside else []
        sides = [
            Side(
                name,
                *(
                    stack.enter_context(
                        mesh(
                            model,
                            *options.set,
                            *own,
                            checkout=checkout,
                            step_s=step_s,
                            locked=options.locked,
                        )
                    )
                    for step_s in (0.0, STEP_S)
                ),
            )
            for name, checkout, own in [*wanted, ("now", "", [])]
        ]
        direct_s: list[float] = []
        for number in range(-1, options.rounds):
            took_s = play(sides, direct, number, chat=options.chat, scale=options.scale)
            direct_s += took_s
            if number < 0:  # what is done once, by either
                direct_s.clear()
                for side in sides:
                    side.figures.clear()
    direct_ms = statistics.median(direct_s) * 1000
    table = rows(sides, direct_ms)
    if options.json:
        figures = {name: dict(zip([s.name for s in sides], values, strict=True)) for name, values in table}
        print(json.dumps({"direct_p50_ms": direct_ms, "locked": options.locked, **figures}))
        return
    print(f"a server that does nothing: {direct_ms:.3f} ms")
    print(
        f"{'':<52}" + "".join(f"{side.name:>10}" for side in sides) + ("     ratio" if len(sides) > 1 else "")
    )
    for what, values in table:
        ratio = f"{values[1] / values[0]:10.2f}" if len(values) > 1 and values[0] else ""
        print(f"{what:<52}" + "".join(f"{value:10.2f}" for value in values) + ratio)


if __name__ == "__main__":
    main()
