"""Variants of the native step beside each other, in turns, by one thread and in its CPU time.

    python benchmarks/engine/engine_variants.py [--variants avx512,avx512bf16] [--rounds 5] [--json]
    python benchmarks/engine/engine_variants.py --variants avx512bf16,avx512bf16:int8 --kinds decode

A variant may name its kind of weights (``model.weights``) behind a colon.
Milliseconds as median (least-most) of the rounds; ``ratio``: the first variant / this one, round by round.
CPU time holds on a machine that others use, but for what they take of caches and memory. ``GFLOP/s``: two
for each weight of a layer and row, by the best round: sums of attention and all that is no product are not
counted, their time is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from engine_parts.spread import Spread, number, ratios
from engine_parts.steps import Engine, decode, prefill, timed_ms

from microserve.kernels.cuda_module import KernelUnavailable

KINDS = [decode(1, 256), decode(8, 256), decode(32, 256), decode(1, 2000), prefill(512), prefill(2048)]
DECODES_IN_A_ROW = 4


def measure(engine: Engine, variants: list[str], rounds: int, wanted: str) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    runners = {name: engine.native(1, *name.split(":")) for name in variants}
    kinds = [kind for kind in KINDS if wanted in kind.name]
    weights = sum(each.numel() for each in engine.model.module.model.layers.parameters())  # type: ignore[union-attr]
    ms: dict[tuple[str, str], list[float]] = {(kind.name, name): [] for kind in kinds for name in variants}
    for turn in range(-1, rounds):
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
        for kind in kinds:
            for name in variants if turn % 2 else reversed(variants):
                times = DECODES_IN_A_ROW if kind.kv_tokens else 1
                taken = timed_ms(runners[name], kind, times, time.process_time)
                if turn >= 0:  # before: what is done once
                    ms[kind.name, name].append(taken)
    return [
        {
            "step": kind.name,
            "variant": name,
            "cpu_ms": Spread.of(ms[kind.name, name]).as_json(),
            "ratio": ratios(ms[kind.name, variants[0]], ms[kind.name, name]).as_json(),
            "gflop_per_s": round(2 * weights * kind.num_tokens / min(ms[kind.name, name]) / 1e6, 1),
        }
        for kind in kinds
        for name in variants
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Its directory; default: the demo model.")
    parser.add_argument("--variants", default="avx512,avx512bf16")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", default="", help="Only those whose name has this in it: decode, 2,048.")
    parser.add_argument("--quick", action="store_true", help="Decodes of one context, 2 rounds.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    variants, rounds, wanted = options.variants.split(","), options.rounds, options.kinds
    if options.quick:
        rounds, wanted = 2, "at 256"
    try:
        rows = measure(Engine(options.model, options.dtype), variants, rounds, wanted)
    except KernelUnavailable as error:
        raise SystemExit(f"no such variant: {error}") from None
    if options.json:
        print(json.dumps({"rounds": rounds, "rows": rows}))
        return
    print(f"{'':<20}{'variant':<18}{'CPU ms':>22}{'ratio':>20}{'GFLOP/s':>10}")
    for row in rows:
        spreads = (Spread(*row["cpu_ms"]), Spread(*row["ratio"]))  # type: ignore[misc]
        told = f"{spreads[0]!s:>22}{spreads[1]!s:>20}{number(float(str(row['gflop_per_s']))):>10}"
        print(f"{row['step']:<20}{row['variant']:<18}{told}")


if __name__ == "__main__":
    main()
