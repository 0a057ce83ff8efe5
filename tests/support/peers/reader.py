"""Reads an engine's KV events by the classes of vLLM or of SGLang, which its environment has, and of nothing
of ours. Every seventh message it throws away, and asks for a replay.

    python reader.py vllm|sglang EVENTS REPLAY

A line on its input asks for a report: which names are held, and how many batches came how.
"""

from __future__ import annotations

import importlib.util
import json
import select
import sys
import types
from pathlib import Path
from typing import Any

import msgspec
import zmq

END = b"\xff" * 8
LOSE_EACH = 7


def batch_class(package: str) -> Any:
    if package == "vllm":
        from vllm.distributed.kv_events import KVEventBatch

        return KVEventBatch
    # Of SGLang only this file: the package itself needs torch, and a GPU's kernels.
    [place] = (p for p in map(Path, sys.path) if (p / "sglang/srt").is_dir())
    for name, attribute in (("runtime_context", "get_parallel"), ("utils.network", "NetworkAddress")):
        stub = types.ModuleType(f"sglang.srt.{name}")
        setattr(stub, attribute, None)
        sys.modules[stub.__name__] = stub
    file = place / "sglang/srt/disaggregation/kv_events.py"
    spec = importlib.util.spec_from_file_location("kv_events", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kv_events"] = module
    spec.loader.exec_module(module)
    return module.KVEventBatch


class Reader:
    def __init__(self, package: str, events: str, replay: str) -> None:
        self._decoder = msgspec.msgpack.Decoder(type=batch_class(package))
        context = zmq.Context()
        self.sub = context.socket(zmq.SUB)
        self.sub.connect(events)
        self.sub.setsockopt(zmq.SUBSCRIBE, b"")
        self._dealer = context.socket(zmq.DEALER)
        self._dealer.connect(replay)
        self.held: set[int] = set()
        self.next_seq = 0
        self.num_live = self.num_replayed = self.num_seen = 0

    def take(self) -> None:
        _, seq_bytes, payload = self.sub.recv_multipart()
        self.num_seen += 1
        if self.num_seen % LOSE_EACH == 0:
            return
        seq = int.from_bytes(seq_bytes, "big")
        if seq > self.next_seq:
            self.replay()
        if seq == self.next_seq:
            self.num_live += 1
            self._apply(seq, payload)

    def replay(self) -> None:
        self._dealer.send_multipart([b"", self.next_seq.to_bytes(8, "big")])
        while True:
            delimiter, _, seq_bytes, payload = self._dealer.recv_multipart()
            assert delimiter == b""
            if seq_bytes == END:
                return
            self.num_replayed += 1
            self._apply(int.from_bytes(seq_bytes, "big"), payload)

    def _apply(self, seq: int, payload: bytes) -> None:
        assert seq == self.next_seq, (seq, self.next_seq)
        self.next_seq += 1
        for event in self._decoder.decode(payload).events:
            match type(event).__name__:
                case "BlockStored":
                    assert event.parent_block_hash is None or event.parent_block_hash in self.held
                    assert len(event.token_ids) == event.block_size * len(event.block_hashes)
                    self.held.update(event.block_hashes)
                case "BlockRemoved":
                    self.held.difference_update(event.block_hashes)
                case "AllBlocksCleared":
                    self.held.clear()


def main(package: str, events: str, replay: str) -> None:
    reader = Reader(package, events, replay)
    poller = zmq.Poller()
    poller.register(reader.sub, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if reader.sub in ready:
            reader.take()
        elif select.select([sys.stdin], [], [], 0)[0]:
            if not sys.stdin.readline():
                return
            reader.replay()
            report = {
                "held": sorted(reader.held),
                "live": reader.num_live,
                "replayed": reader.num_replayed,
            }
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
