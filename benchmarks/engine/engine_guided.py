"""Constrained decoding beside free decoding, in turns, and what grammar bombs cost others.

    python benchmarks/engine/engine_guided.py [--streams 1,8,32] [--tokens 40] [--rounds 5] [--bombs 10]

One engine core over the native step, without sockets. ``ratio``: CPU time of a guided round / of a free one,
of as many tokens; each round both, one right after the other. Guided streams have a JSON schema whose strings
are long, so that most masks are wide, which is the dearer kind. Bombs: while one stream a time is served, a
grammar a second that is refused after much work comes from somebody else; ``ttft`` is the others' time to the
first token, with and without, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

import structlog
from engine_parts.spread import Spread, ratios
from engine_parts.steps import BLOCK_SIZE, NUM_BLOCKS, Engine, demo_model

from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.core import EngineCore
from microserve.services.engine.guidance.pool import GuidePool, compiler_of
from microserve.services.engine.native.packing import native_runner

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 400},
        "kind": {"enum": ["cat", "dog"]},
        "ids": {"type": "array", "items": {"type": "integer"}, "minItems": 400},
    },
    "required": ["title", "kind", "ids"],
}
BOMB = {
    "type": "object",
    "properties": {f"k{i}": {"type": "string", "pattern": f"(a|b)*{i}.{{9}}"} for i in range(999)},
}
"""As large as bounds let it be; another one each time."""


class Bench:
    def __init__(self, model: str) -> None:
        directory = Path(demo_model(model))
        engine = Engine(str(directory), "bfloat16")
        spec = engine.model.spec
        heap = MemoryHeap(engine.layout, incarnation=1, registry=MemoryRegistry(), num_slots=8)
        runner = native_runner(engine.model, heap.data, NUM_BLOCKS, BLOCK_SIZE, threads=1, max_rows=512)
        ends = frozenset(spec.eos_token_ids)
        self.core = EngineCore(
            engine_id="e",
            incarnation=1,
            model=engine.layout.model,
            heap=heap,
            runner=runner,
            limits=Limits(spec.max_model_len, spec.vocab_size, NUM_BLOCKS, 512, ends),
            max_num_seqs=64,
            max_num_batched_tokens=512,
            lease_s=30.0,
            checksums=False,
            guides=GuidePool(
                lambda: compiler_of(directory, spec.vocab_size, ends), spec.vocab_size, max_s=5.0
            ),
        )
        self._count, self._vocab_size = 0, spec.vocab_size
        self._dice = random.Random(1)

    def ask(self, params: SamplingParams, length: int = 32) -> str:
        self._count += 1
        request_id = f"r{self._count}"
        prompt = [self._dice.randrange(3, min(9000, self._vocab_size)) for _ in range(length)]
        message = wire.StartGenerate(self._count, request_id, 0, params, 600.0)
        with self.core.lock:
            self.core.actions.start_generate(b"router", message, prompt, self.core.clock())
            self.core.wake()
        return request_id

    def until(self, request_ids: set[str]) -> None:
        """Step until they have ended."""
        left = set(request_ids)
        while left:
            if not self.core.step():
                self.core.wait_for_work(0.05)
            with self.core.lock:
                outbox, _ = self.core.take_output()
            left -= {delta.request_id for _, delta in outbox.deltas if delta.finished}

    def round(self, num_streams: int, num_tokens: int, grammar: Grammar | None) -> float:
        """CPU time, in milliseconds a token, of ``num_streams`` answers together."""
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, grammar=grammar)
        began = time.process_time()
        self.until({self.ask(params) for _ in range(num_streams)})
        return (time.process_time() - began) * 1e3 / (num_streams * num_tokens)

    def ttft_ms(self) -> float:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        self.until({self.ask(params, 64)})
        return (time.perf_counter() - began) * 1e3

    def bomb(self) -> None:
        self._count += 1
        text = json.dumps({**BOMB, "title": str(self._count)})
        self.ask(SamplingParams(max_tokens=1, grammar=Grammar(kind="json_schema", text=text)))


def bombs(bench: Bench, count: int) -> dict[str, Spread]:
    """Of ``count`` seconds with a bomb at their begin, and as many without, in turns; times in ms."""
    found: dict[str, list[float]] = {"a bomb a second": [], "none": []}
    for turn in range(count):
        for name in sorted(found, reverse=turn % 2 == 0):
            ends = time.perf_counter() + 1.0
            if name != "none":
                bench.bomb()
            while time.perf_counter() < ends:
                found[name].append(bench.ttft_ms())
    return {name: Spread.of(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bombs", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one round, few tokens, one bomb")
    options = parser.parse_args()
    if options.quick:
        options.streams, options.tokens, options.rounds, options.bombs = "1,8", 8, 1, 1
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # a line a request is no figure
    bench = Bench(options.model)
    grammar = Grammar(kind="json_schema", text=json.dumps(SCHEMA))
    rows = []
    bench.round(1, 4, grammar)
    for num_streams in map(int, options.streams.split(",")):
        sides: dict[str, list[float]] = {"free": [], "guided": []}
        for _ in range(options.rounds):
            sides["free"].append(bench.round(num_streams, options.tokens, None))
            sides["guided"].append(bench.round(num_streams, options.tokens, grammar))
        ratio = ratios(sides["guided"], sides["free"])
        free, guided = Spread.of(sides["free"]), Spread.of(sides["guided"])
        rows.append({"streams": num_streams, "ratio": ratio.as_json()})
        if not options.json:
            print(f"{num_streams:3} streams, CPU ms a token: free {free}, guided {guided}; ratio {ratio}")
    ttft = bombs(bench, options.bombs) if options.bombs else {}
    if options.json:
        print(json.dumps({"rows": rows, "ttft_ms": {name: each.as_json() for name, each in ttft.items()}}))
    for name, spread in ttft.items() if not options.json else ():
        print(f"TTFT of others in ms, {name}: {spread}")
    bench.core.close()
    sys.stdout.flush()
    os._exit(0)  # as services end: a grammar that is still compiled has a thread that nobody can end


if __name__ == "__main__":
    main()
