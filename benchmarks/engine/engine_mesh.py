"""Two engines of one thread each behind router and gateway, beside two bare native steps, in turns.

    python benchmarks/engine/engine_mesh.py [--rounds 5] [--streams 1,8] [--dtype bfloat16] [--json]

``bare``: two processes that step through the same prompts with nothing around the native step, at the same
time. ``--streams``: of each engine, so twice as many go through the gateway. Tokens a second of the part in
which every stream decodes, both engines together; share: mesh / bare, round by round.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack

from engine_parts.peers import Peer, bare_engine
from engine_parts.serving import Mesh, Prompts, mesh, steady
from engine_parts.spread import Spread, ratios
from engine_parts.steps import demo_model

PROMPT_TOKENS, NUM_ENGINES = 128, 2


def bare_rate(bare: list[Peer], prompts: list[list[int]], num_tokens: int) -> float:
    shares = [prompts[each :: len(bare)] for each in range(len(bare))]
    for one, share in zip(bare, shares, strict=True):
        one.ask(share, num_tokens)
    return sum(steady(one.answer(num_tokens)).tokens_per_s for one in bare)


def mesh_rate(made: Mesh, prompts: list[list[int]], num_tokens: int) -> float:
    return steady(made.play(prompts, num_tokens)).tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Its directory; default: the demo model.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", default="1,8", help="Of each engine.")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=0, help="Of each stream; 64, quick 32.")
    parser.add_argument("--quick", action="store_true", help="8 streams, 2 rounds of 32 tokens.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    streams, rounds, tokens = (
        [int(each) for each in options.streams.split(",")],
        options.rounds,
        options.tokens or 64,
    )
    if options.quick:
        streams, rounds, tokens = [8], 2, options.tokens or 32
    model = demo_model(options.model)
    prompts = Prompts(model, seed=2)
    rates: dict[int, tuple[list[float], list[float]]] = {count: ([], []) for count in streams}
    with ExitStack() as stack:
        made = stack.enter_context(mesh(model, NUM_ENGINES, 1, options.dtype))
        bare = [stack.enter_context(bare_engine(model, 1, options.dtype)) for _ in range(NUM_ENGINES)]
        for turn in range(-1, rounds):
            for count in streams:
                asked = prompts.draw(count * NUM_ENGINES, PROMPT_TOKENS)
                sides = [
                    lambda p=asked: mesh_rate(made, p, tokens),
                    lambda p=asked: bare_rate(bare, p, tokens),
                ]
                for number in (0, 1) if turn % 2 else (1, 0):
                    rate = sides[number]()
                    if turn >= 0:  # before: what is done once
                        rates[count][number].append(rate)
    rows = []
    for count, (through, alone) in rates.items():
        rows.append(
            {
                "streams_an_engine": count,
                "mesh_tokens_per_s": Spread.of(through).as_json(),
                "bare_tokens_per_s": Spread.of(alone).as_json(),
                "share": ratios(through, alone).as_json(),
            }
        )
    if options.json:
        print(json.dumps({"quick": options.quick, "rounds": rounds, "dtype": options.dtype, "rows": rows}))
        return
    for row in rows:
        names = ("mesh_tokens_per_s", "bare_tokens_per_s", "share")
        through, alone, share = (str(Spread(*row[name])) for name in names)  # type: ignore[misc]
        print(f"{row['streams_an_engine']} streams an engine: mesh {through}, bare {alone}, share {share}")


if __name__ == "__main__":
    main()
