"""What it costs that every socket is locked: two meshes, one with keys and one without, in turns.

    python benchmarks/mesh/locked.py [--model DIR] [--rounds 8] [--streams 8] [--tokens 64] [--before DIR]

Both meshes stay up and take turns, so that what else the machine does falls on both alike; which of them goes
first alternates. Prints tokens a second of concurrent streams, and the milliseconds of one short request
alone, as medians over the rounds with the ratio of locked to open. A small random model says most: next to
nothing is computed, and what is left is the mesh. ``--before``: the open one is that of another checkout,
which knows no ``bus.insecure``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from contextlib import ExitStack

import httpx
from control_parts.sides import ALONE, Side, ask_alone, mesh, play

from microserve.services.local.demo.model import default_cache, fetch


async def play_round(side: Side, number: int, streams: int, tokens: int) -> None:
    async with httpx.AsyncClient(timeout=600.0) as client:
        for each in range(ALONE):
            await ask_alone(client, side, number)
            if each < ALONE // 4:
                side.alone_ms.pop()
    await play(side, number, streams, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Default: the demo model.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--before", default="")
    options = parser.parse_args()
    model = options.model or str(fetch(default_cache(os.environ), lambda what, part: None))
    with ExitStack() as stack:
        insecure = [] if options.before else ["bus.insecure=true"]
        open_side = stack.enter_context(mesh(model, *insecure, checkout=options.before))
        locked = stack.enter_context(mesh(model))
        sides = [open_side, locked]
        for number in range(-1, options.rounds):
            for side in sides if number % 2 else reversed(sides):
                asyncio.run(play_round(side, number, options.streams, options.tokens))
            if number < 0:  # what is done once, by either
                for side in sides:
                    side.forget()
    for what, values in (
        ("tokens/s", "rates"),
        ("CPU ms a token", "cpu_ms"),
        ("one request alone, ms", "alone_ms"),
    ):
        without, with_keys = (statistics.median(getattr(side, values)) for side in sides)
        print(f"{what:<24} open {without:9.2f}   locked {with_keys:9.2f}   ratio {with_keys / without:.3f}")
    fastest = [statistics.quantiles(side.alone_ms, n=20)[0] for side in sides]
    print(f"{'the fastest 5 %, ms':<24} open {fastest[0]:9.2f}   locked {fastest[1]:9.2f}")
    ratios = sorted(b / a for a, b in zip(open_side.rates, locked.rates, strict=True))
    print(f"tokens/s, round by round: {' '.join(f'{each:.3f}' for each in ratios)}")


if __name__ == "__main__":
    main()
