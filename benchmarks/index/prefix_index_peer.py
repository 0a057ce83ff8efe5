"""The prefix index beside Dynamo's radix tree, over the requests of a trace: both in one run, in turns.

    python benchmarks/index/prefix_index_peer.py [--trace FILE] [--dynamo PYTHON] [--engines 8] [--json]

Every request is looked up by its tokens, and then stored by one engine, which announces the blocks that are
new to it. ``--trace`` is a file in Mooncake's format; without it, requests of the same kind are drawn. A
block of the trace (512 tokens) is one block of 16 tokens here. ``--dynamo`` is the interpreter of an
environment with ``ai-dynamo-runtime``; without it our side runs alone. Times are microseconds of wall time
of each call; answers of both sides are compared with each other.

    lookup, tokens   hash the prompt and find who holds how much of it
    lookup, hashes   the same for a caller who has the hashes: every block is hashed, ours and theirs
    apply            one event, decoded (Dynamo's call parses its event as well: decode + apply does too)
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microserve.kvcache.prefix.hash import BlockHash, block_hashes, root_hash
from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol.bus.codec import decode_tokens, encode_tokens
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import BlockStored, KVEventBatch, encode_batch
from microserve.services.simulation.load.trace import HASH_TOKENS, TraceRequest, read_trace

BLOCK_SIZE = 16
MODEL = "benchmark"
TURN = 250
"""Requests that one side takes before the other."""
PEER = Path(__file__).parent / "index_parts" / "dynamo_radix.py"


@dataclass
class Side:
    """Microseconds of one side's calls, and CPU seconds of all of them."""

    tokens: list[float] = field(default_factory=list)
    hashes: list[float] = field(default_factory=list)
    apply: list[float] = field(default_factory=list)
    decoded: list[float] = field(default_factory=list)
    find_cpu_s: float = 0.0
    apply_cpu_s: float = 0.0
    num_blocks: int = 0
    nbytes: int = 0
    """As counted by ours; by how much Dynamo's process has grown."""


@dataclass
class Request:
    engine: int
    frame: bytes
    """Its tokens, as they come off the wire."""
    hashes: list[BlockHash]
    num_held: int
    """Blocks at its start that the engine has already."""

    @property
    def tokens(self) -> list[int]:
        return decode_tokens(self.frame)

    def payload(self) -> bytes | None:
        if self.num_held == len(self.hashes):
            return None
        names = self.hashes[self.num_held :]
        parent = self.hashes[self.num_held - 1] if self.num_held else None
        tokens = self.tokens[self.num_held * BLOCK_SIZE : len(self.hashes) * BLOCK_SIZE]
        return encode_batch(KVEventBatch(0.0, [BlockStored([*names], parent, tokens, BLOCK_SIZE)]))


def drawn_trace(num_requests: int) -> list[TraceRequest]:
    """Conversations as in Mooncake's trace: all begin with one block, two in five go on from another one, and
    lengths are log-normal (median 14 blocks, mean 24)."""
    rng = random.Random(0)
    talks: list[tuple[int, ...]] = []
    requests = []
    number = 1
    for _ in range(num_requests):
        known = rng.choice(talks[-4000:]) if talks and rng.random() < 0.4 else (0,)
        count = min(250, max(1, round(rng.lognormvariate(2.64, 1.04))))
        new = max(1, count - len(known))
        hash_ids = (*known[: max(1, count - 1)], *range(number, number + new))
        number += new
        talks.append(hash_ids)
        requests.append(TraceRequest(0.0, HASH_TOKENS * len(hash_ids), 1, hash_ids))
    return requests


def load_of(requests: list[TraceRequest], num_engines: int) -> Iterator[Request]:
    rng, root = random.Random(0), root_hash(MODEL)
    held: list[set[BlockHash]] = [set() for _ in range(num_engines)]
    for request in requests:
        tokens = request.prompt(HASH_TOKENS // BLOCK_SIZE)
        hashes = block_hashes(tokens, BLOCK_SIZE, root)
        engine = rng.randrange(num_engines)
        num_held = 0
        while num_held < len(hashes) and hashes[num_held] in held[engine]:
            num_held += 1
        held[engine].update(hashes)
        yield Request(engine, encode_tokens(tokens), hashes, num_held)


class Ours:
    def __init__(self) -> None:
        self.index = PrefixIndex(BLOCK_SIZE, MODEL, 1 << 40)
        self.side = Side()

    def turn(self, requests: list[Request]) -> list[dict[str, int]]:
        side, index, found = self.side, self.index, []
        clock, cpu = time.perf_counter_ns, time.thread_time
        # Off the wire, as a router has them, and as the other side does.
        asked = [(decode_tokens(request.frame), request.payload()) for request in requests]
        for request, (tokens, payload) in zip(requests, asked, strict=True):
            hashes, engine = request.hashes, str(request.engine)
            cpu_s, start = cpu(), clock()
            matched = index.lookup(tokens)
            ended = clock()
            side.find_cpu_s += cpu() - cpu_s
            side.tokens.append((ended - start) / 1e3)
            start = clock()
            by_hashes = index.lookup_hashes(hashes)
            side.hashes.append((clock() - start) / 1e3)
            if by_hashes != matched:
                raise SystemExit(f"{by_hashes} by hashes, {matched} by tokens")
            found.append({name: count // BLOCK_SIZE for name, count in matched.items()})
            if payload is None:
                continue
            start = clock()
            events = decode_batch(payload).events
            decoded = clock()
            cpu_s, begun = cpu(), clock()
            index.apply(engine, events)
            ended = clock()
            side.apply_cpu_s += cpu() - cpu_s
            side.apply.append((ended - begun) / 1e3)
            side.decoded.append((decoded - start + ended - begun) / 1e3)
            side.num_blocks += len(hashes) - request.num_held
        side.nbytes = index.nbytes
        return found


class Dynamo:
    def __init__(self, python: str) -> None:
        self.child = subprocess.Popen(
            [python, str(PEER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.side = Side()

    def turn(self, requests: list[Request]) -> list[dict[str, int]]:
        assert self.child.stdin is not None and self.child.stdout is not None
        asked = []
        for request in requests:
            names = [int.from_bytes(name[:8], "little") for name in request.hashes]
            new = names[request.num_held :]
            parent = names[request.num_held - 1] if request.num_held else None
            asked.append([request.engine, request.tokens, [parent, new] if new else None])
            self.side.num_blocks += len(new)
        print(json.dumps(asked), file=self.child.stdin, flush=True)
        told = json.loads(self.child.stdout.readline())
        for hashed, found, applied, _ in told["answers"]:
            self.side.tokens.append((hashed + found) / 1e3)
            self.side.hashes.append(found / 1e3)
            if applied:
                self.side.apply.append(applied / 1e3)
        self.side.find_cpu_s += told["find_s"]
        self.side.apply_cpu_s += told["apply_s"]
        self.side.nbytes = told["grown_nbytes"]
        return [matched for *_, matched in told["answers"]]


def spread(times: list[float]) -> tuple[float, float]:
    ordered = sorted(times)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]


def rows(side: Side, num_distinct: int) -> dict[str, float]:
    told: dict[str, float] = {}
    for name in ("tokens", "hashes", "apply", "decoded"):
        if times := getattr(side, name):
            told[f"{name}_p50_us"], told[f"{name}_p99_us"] = spread(times)
    told["lookup_cpu_us"] = side.find_cpu_s / len(side.tokens) * 1e6
    told["apply_cpu_us"] = side.apply_cpu_s / len(side.apply) * 1e6
    told["bytes_per_block"] = side.nbytes / num_distinct
    told["apply_mblocks_per_s"] = side.num_blocks / sum(side.apply)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", default="")
    parser.add_argument("--dynamo", default="", metavar="PYTHON")
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--requests", type=int, default=12_031, help="0: all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    trace = read_trace(options.trace) if options.trace else drawn_trace(options.requests or 12_031)
    requests = list(load_of(trace[: options.requests or None], options.engines))
    gc.collect()
    gc.freeze()
    ours, peer = Ours(), Dynamo(options.dynamo) if options.dynamo else None
    num_wrong = 0
    for start in range(0, len(requests), TURN):
        turn = requests[start : start + TURN]
        found = ours.turn(turn)
        if peer is not None:
            num_wrong += sum(a != b for a, b in zip(found, peer.turn(turn), strict=True))
    told: dict[str, Any] = {
        "requests": len(requests),
        "blocks": sum(len(request.hashes) for request in requests),
        "differing_answers": num_wrong,
        "microserve": rows(ours.side, ours.index.num_blocks),
        "dynamo": rows(peer.side, ours.index.num_blocks) if peer is not None else None,
    }
    if options.json:
        print(json.dumps(told))
        return
    print(
        f"{told['requests']} requests, {told['blocks']} blocks, {options.engines} engines; "
        f"{ours.index.num_blocks} of them distinct; {num_wrong} answers differ"
    )
    for name, value in told["microserve"].items():
        theirs = (told["dynamo"] or {}).get(name)
        beside = f"  Dynamo {theirs:8.2f}  {theirs / value:5.2f} x" if theirs is not None else ""
        print(f"{name:22}{value:9.2f}{beside}")


if __name__ == "__main__":
    main()
