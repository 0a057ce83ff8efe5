"""One vLLM behind the mesh beside ``vllm serve`` alone, over HTTP, in turns: tokens a second and first token.

    python benchmarks/engine/vllm_mesh.py [--rounds 5] [--streams 1,8] [--python .vllm/bin/python] [--json]

The same requests to both, which is told what in ``engine_parts/vllm_server.py``: prompts of 128 tokens that
neither has seen, greedy, ``ignore_eos``. *Rates*: the part in which every stream decodes; share: mesh /
alone, round by round. *First token*: of one stream on an idle side, prompt by prompt on both one right after
the other, cold, and once more with the prompt in both caches; median of the differences, mesh - alone, with
its interval of 95 %. Both sides stay up; which goes first alternates, and each waits until the other one's
processes are at rest. Without vLLM's environment it is a line and no figure.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

from engine_parts.serving import Mesh, Prompts, mesh, steady
from engine_parts.spread import Spread, differences, of_median, ratios
from engine_parts.steps import demo_model
from engine_parts.vllm_server import PYTHON, Shape, rest, vllm_serve

PROMPT_TOKENS = 128
SHAPE = Shape(max_num_batched_tokens=512)
FIRST_TOKENS = 4
"""Of a stream of which only the first token counts."""
COLD, WARM = "cold", "cached"

Both = tuple[list[float], list[float]]
"""Of the mesh, of the one alone."""


class Taken:
    """What was measured, in the order of the rounds."""

    def __init__(self, counts: list[int]) -> None:
        self.rates: dict[int, Both] = {count: ([], []) for count in counts}
        self.firsts: dict[str, Both] = {COLD: ([], []), WARM: ([], [])}

    def rows(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = [
            {
                "streams": count,
                "mesh_tokens_per_s": Spread.of(ours).as_json(),
                "alone_tokens_per_s": Spread.of(theirs).as_json(),
                "share": ratios(ours, theirs).as_json(),
            }
            for count, (ours, theirs) in self.rates.items()
        ]
        rows += [
            {
                "first_token": prompt,
                "mesh_ms": of_median(ours).as_json(),
                "alone_ms": of_median(theirs).as_json(),
                "more_ms": differences(ours, theirs).as_json(),
            }
            for prompt, (ours, theirs) in self.firsts.items()
            if ours
        ]
        return rows


def order(number: int) -> tuple[int, int]:
    return (0, 1) if number % 2 else (1, 0)


def play_rates(sides: list[Mesh], prompts: Prompts, turn: int, num_tokens: int, into: Taken | None) -> None:
    for count in [1, 8] if into is None else into.rates:
        asked = prompts.draw(count, PROMPT_TOKENS)
        for number in order(turn):
            rest()
            found = steady(sides[number].play(asked, num_tokens))
            if into is not None:
                into.rates[count][number].append(found.tokens_per_s)


def play_firsts(sides: list[Mesh], prompts: Prompts, pairs: int, into: Taken | None) -> None:
    for pair, prompt in enumerate(prompts.draw(pairs, PROMPT_TOKENS)):
        for which in (COLD, WARM):
            for number in order(pair):
                rest()
                [stream] = sides[number].play([prompt], FIRST_TOKENS)
                if into is not None:
                    into.firsts[which][number].append(stream.times[0] * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Its directory; default: the demo model.")
    parser.add_argument("--python", type=Path, default=PYTHON, help="Of vLLM's environment.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--tokens", type=int, default=64, help="Of each stream.")
    parser.add_argument("--firsts", type=int, default=8, help="Prompts a round for the first token.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    python = options.python.absolute()
    if not python.exists():
        print(f"no figures: {python} is not there (`make vllm` makes it)")
        return
    model, taken = demo_model(options.model), Taken([int(each) for each in options.streams.split(",")])
    prompts = Prompts(model, seed=3)
    with ExitStack() as stack:
        server = stack.enter_context(vllm_serve(python, model, SHAPE))  # both start at a time
        made = stack.enter_context(mesh(model, 1, 1, "bfloat16", *SHAPE.settings(python)))
        sides = [made, server.ready()]
        play_rates(sides, prompts, 0, options.tokens, None)  # what is done once
        play_firsts(sides, prompts, 2, None)
        for turn in range(options.rounds):
            play_rates(sides, prompts, turn, options.tokens, taken)
            play_firsts(sides, prompts, options.firsts, taken)
    if options.json:
        print(json.dumps({"rounds": options.rounds, "rows": taken.rows()}))
        return
    for row in taken.rows():
        (head, value), *cells = row.items()
        said = ", ".join(f"{name.replace('_', ' ')} {Spread(*cell)}" for name, cell in cells)  # type: ignore[misc]
        print(f"{head.replace('_', ' ')} {value}: {said}")


if __name__ == "__main__":
    main()
