"""A step of the engine: native kernels beside the transformers path and the memory's bound, in turns.

    python benchmarks/engine/engine_step.py [--rounds 7] [--threads 1,2] [--dtypes bfloat16,float32] [--json]

In a round every kind of step is taken by each side, one right after the other, and the memory is read in
between by as many threads: of each, milliseconds as median (least-most) of the rounds. ``speedup``:
transformers / native, round by round. ``bound``: bytes that a decode cannot but read (weights once, and the
KV of its contexts) at the speed of that reading; ``share``: bound / native, by the medians and by the best of
each, which other work on the machine disturbs least. Of one thread both ratios are taken in CPU time as well
(``cpu_``): that holds on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field

import torch
from engine_parts.memory import Memory, Speed
from engine_parts.spread import Spread, number, ratios
from engine_parts.steps import Engine, Kind, decode, prefill, timed_ms

from microserve.kernels.cuda_module import KernelUnavailable
from microserve.services.engine.model.runner import ModelRunner
from microserve.services.engine.native.runner import NativeRunner

KINDS = [decode(1, 256), decode(8, 256), decode(32, 256), decode(1, 2000), prefill(512), prefill(2048)]
QUICK = [decode(1, 256), decode(8, 256), prefill(512)]
DECODES_IN_A_ROW = 6
SIDES = ("native", "transformers")


@dataclass
class Row:
    """One kind of step, with one dtype and number of threads."""

    dtype: str
    threads: int
    kind: Kind
    read_nbytes: int
    variant: str
    ms: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    cpu_ms: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    """CPU time of all threads: it holds what they spin."""
    memory: list[Speed] = field(default_factory=list)

    def figures(self) -> dict[str, object]:
        made: dict[str, object] = {
            "dtype": self.dtype,
            "threads": self.threads,
            "step": self.kind.name,
            "variant": self.variant,
            "speedup": ratios(self.ms["transformers"], self.ms["native"]).as_json(),
        }
        for side in SIDES:
            made[f"{side}_ms"] = Spread.of(self.ms[side]).as_json()
            made[f"{side}_cpu_ms"] = Spread.of(self.cpu_ms[side]).as_json()
        native_s = Spread.of(self.ms["native"])
        made["tokens_per_s"] = float(f"{self.kind.num_tokens / native_s.median * 1e3:.4g}")
        if self.kind.kv_tokens:
            speed = Spread.of([each.wall for each in self.memory])
            made["memory_gb_s"] = speed.as_json()
            made["bound_ms"] = float(f"{self.read_nbytes / speed.median / 1e6:.4g}")
            made["share"] = float(f"{self.read_nbytes / speed.median / 1e6 / native_s.median:.3g}")
            made["share_of_best"] = float(f"{self.read_nbytes / speed.most / 1e6 / native_s.least:.3g}")
        if self.threads == 1:  # two threads wait for each other, and some of them spin
            made["cpu_speedup"] = ratios(self.cpu_ms["transformers"], self.cpu_ms["native"]).as_json()
            if self.kind.kv_tokens:
                bounds = [self.read_nbytes / each.cpu / 1e6 for each in self.memory]
                made["cpu_share"] = ratios(bounds, self.cpu_ms["native"]).as_json()
        return made


def measure(
    engine: Engine, dtype: str, threads: int, kinds: list[Kind], rounds: int, variant: str
) -> list[Row]:
    torch.set_num_threads(threads)
    native = engine.native(threads, variant)
    runners: dict[str, ModelRunner | NativeRunner] = {"native": native, "transformers": engine.transformers()}
    name = native.kernels
    rows = [Row(dtype, threads, kind, engine.read_nbytes(kind), name) for kind in kinds]
    memory = Memory()
    for turn in range(-1, rounds):
        print(f"{dtype}, {threads} threads: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
        for row in rows:
            for side in SIDES if turn % 2 else reversed(SIDES):
                times = DECODES_IN_A_ROW if row.kind.kv_tokens else 1
                cpu_s = time.process_time()
                ms = timed_ms(runners[side], row.kind, times)
                cpu_ms = (time.process_time() - cpu_s) * 1e3
                if turn >= 0:  # before: what is done once
                    row.ms[side].append(ms)
                    row.cpu_ms[side].append(cpu_ms / (times + (1 if row.kind.kv_tokens else 0)))
            if turn >= 0:
                row.memory.append(memory.read(threads))
    return rows


def show(rows: list[dict[str, object]]) -> None:
    def spread(value: object) -> str:
        return str(Spread(*value)) if isinstance(value, list) else "-"

    heads = f"{'native ms':>22}{'transformers ms':>22}{'speedup':>20}{'bound ms':>10}{'share (best)':>16}"
    print(f"{'':<34}{heads}   by CPU time: speedup, share")
    for row in rows:
        what = f"{row['dtype']} {row['threads']} thr {row['step']}"
        bound = f"{number(row['bound_ms'])}" if "bound_ms" in row else ""  # type: ignore[arg-type]
        share = f"{row['share']:.0%} ({row['share_of_best']:.0%})" if "share" in row else ""
        print(
            f"{what:<34}{spread(row['native_ms']):>22}{spread(row['transformers_ms']):>22}"
            f"{spread(row['speedup']):>20}{bound:>10}{share:>16}"
            f"   {spread(row.get('cpu_speedup'))}, {spread(row.get('cpu_share'))}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Its directory; default: the demo model.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--kinds", default="", help="Only those whose name has this in it: decode, 2,048.")
    parser.add_argument("--variant", default="auto", help="Of the native kernels.")
    parser.add_argument("--quick", action="store_true", help="bfloat16, 2 threads, three kinds, 3 rounds.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    kinds, rounds, threads, dtypes = KINDS, options.rounds, options.threads, options.dtypes
    if options.quick:
        kinds, rounds, threads, dtypes = QUICK, 3, "2", "bfloat16"
    kinds = [kind for kind in kinds if options.kinds in kind.name]
    rows = []
    for dtype in dtypes.split(","):
        engine = Engine(options.model, dtype)
        for each in threads.split(","):
            try:
                made = measure(engine, dtype, int(each), kinds, rounds, options.variant)
            except KernelUnavailable as error:
                raise SystemExit(f"no native step: {error}") from None
            rows += [row.figures() for row in made]
    if options.json:
        print(json.dumps({"quick": options.quick, "rounds": rounds, "rows": rows}))
    else:
        show(rows)


if __name__ == "__main__":
    main()
