"""One engine behind router and gateway, over HTTP, beside peers in one process: tokens a second, in turns.

    python benchmarks/engine/engine_http.py [--rounds 5] [--peers openvino,transformers] [--json]

Two threads on each side, bfloat16, prompts of 128 tokens that nobody has seen before, all sent at once,
greedy, ``ignore_eos``. Counted is the part in which every stream decodes. ``prefill``: tokens of one long
prompt a second until its first token, HTTP and mesh in it. All sides stay up and take turns; ratios are round
by round, above 1: this project is faster. Peers come by ``benchmarks/peers.sh``; one that does not is a line.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from engine_parts.peers import NAMES, PeerAbsent, peer
from engine_parts.serving import Prompts, Stream, mesh, steady
from engine_parts.spread import Spread, ratios
from engine_parts.steps import demo_model

PROMPT_TOKENS, THREADS = 128, 2
OURS = "microserve"


class Player(Protocol):
    def play(self, prompts: list[list[int]], num_tokens: int) -> list[Stream]: ...


@dataclass
class Side:
    name: str
    version: str
    player: Player
    figures: dict[str, list[float]] = field(default_factory=dict)
    """By question, one a round: tokens/s."""

    def take(self, question: str, value: float) -> None:
        self.figures.setdefault(question, []).append(value)


def play(sides: list[Side], prompts: Prompts, streams: list[int], prefills: list[int], tokens: int) -> None:
    """One round."""
    for count in streams:
        asked = prompts.draw(count, PROMPT_TOKENS)
        for side in sides:
            side.take(f"decode {count}", steady(side.player.play(asked, tokens)).tokens_per_s)
    for length in prefills:
        asked = prompts.draw(1, length)
        for side in sides:
            side.take(f"prefill {length:,}", length / side.player.play(asked, 1)[0].times[0])


def figures(sides: list[Side]) -> dict[str, object]:
    ours = next(side for side in sides if side.name == OURS)
    rows = []
    for question, values in ours.figures.items():
        row: dict[str, object] = {"question": question, "tokens_per_s": {}, "ratio": {}}
        for side in sides:
            row["tokens_per_s"][side.name] = Spread.of(side.figures[question]).as_json()  # type: ignore[index]
            if side is not ours:
                row["ratio"][side.name] = ratios(values, side.figures[question]).as_json()  # type: ignore[index]
        rows.append(row)
    return {"versions": {side.name: side.version for side in sides}, "rows": rows}


def show(told: dict[str, object], names: list[str]) -> None:
    others = [name for name in names if name != OURS]
    print(f"{'tokens/s':<16}" + "".join(f"{name:>22}" for name in [OURS, *others]) + "   ratios")
    for row in told["rows"]:  # type: ignore[attr-defined]
        cells = "".join(f"{Spread(*row['tokens_per_s'][name])!s:>22}" for name in [OURS, *others])
        ratio = ", ".join(f"{name} {Spread(*row['ratio'][name])}" for name in others)
        print(f"{row['question']:<16}{cells}   {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Its directory; default: the demo model.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default=",".join(NAMES))
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--prefills", default="512,2048")
    parser.add_argument("--tokens", type=int, default=0, help="Of each stream; 64, quick 32.")
    parser.add_argument("--quick", action="store_true", help="1 and 8 streams, prefill 512, 2 rounds.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    streams = [int(each) for each in options.streams.split(",")]
    prefills, rounds, tokens = (
        [int(each) for each in options.prefills.split(",")],
        options.rounds,
        options.tokens or 64,
    )
    if options.quick:
        streams, prefills, rounds, tokens = [1, 8], [512], 2, options.tokens or 32
    model = demo_model(options.model)
    absent = []
    with ExitStack() as stack:
        sides = [Side(OURS, "", stack.enter_context(mesh(model, 1, THREADS, "bfloat16")))]
        for name in filter(None, options.peers.split(",")):
            try:
                made = stack.enter_context(peer(name, model, THREADS))
            except PeerAbsent as error:
                absent.append(str(error))
                print(error, file=sys.stderr)
            else:
                sides.append(Side(name, made.version, made))
        prompts = Prompts(model, seed=1)
        for side in sides:  # what is done once
            side.player.play(prompts.draw(2, PROMPT_TOKENS), 4)
        for turn in range(rounds):
            print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
            play(sides if turn % 2 else sides[::-1], prompts, streams, prefills, tokens)
    told = figures(sides)
    if options.json:
        print(json.dumps({"quick": options.quick, "rounds": rounds, "absent": absent, **told}))
    else:
        show(told, [side.name for side in sides])


if __name__ == "__main__":
    main()
