"""A test as vLLM's front: link, view of the heap, grants on vLLM's blocks; and a peer to exchange KV with.

vLLM runs in ``engine_host.py``, in the Python that has it; the peer is a heap of the test's own whose blocks
have vLLM's order, so what vLLM sends can be looked at, and sent back to it.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
from collections import Counter
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.doors.host import HostHeap, Opening
from microserve.kvcache.heap.heap import PeerHeap
from microserve.kvcache.heap.shm import ShmView
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.kv.grant import Grant
from microserve.services.engine.vllm.link import (
    Allocated,
    Arrived,
    Freed,
    Generate,
    NotArrived,
    Notice,
    Ready,
    Receive,
    Received,
    Refused,
    Send,
    SendFailed,
    Sent,
    params_of,
)
from microserve.services.engine.vllm.link_ends import Front

ROOT = Path(__file__).parents[3]
BLOCK_SIZE = 32
MAX_STEPS = 2000
N = TypeVar("N", Ready, Refused, Allocated, Received, Arrived, NotArrived, Freed, Sent, SendFailed)
ARGUMENTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "block_size": BLOCK_SIZE,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 200,
}
"""Prompts of more than 200 tokens come in chunks that end inside blocks."""


_incarnations = itertools.count(100)


class HostDied(Exception):
    """vLLM's process has ended."""


class Keeper:
    """The pool of a front's grants: vLLM's blocks, which go back by a word and not by a list."""

    def __init__(self) -> None:
        self.in_quarantine: set[int] = set()

    def free(self, blocks: Iterable[int]) -> None:
        """The caller drops the receive."""

    def quarantine(self, blocks: Iterable[int]) -> None:
        self.in_quarantine.update(blocks)

    def discharge(self, blocks: Iterable[int]) -> None:
        self.in_quarantine.difference_update(blocks)


class Hosted:
    def __init__(
        self, python: Path, model: Path, *, incarnation: int = 7, num_blocks: int = 64, **arguments: Any
    ) -> None:
        self.front = Front(
            incarnation=incarnation,
            model="tiny",
            revision="r",
            num_receives=16,
            grant_slots=16,
            checksums=True,
        )
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / ".src"),
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        self.process = subprocess.Popen(
            [python, "-P", str(ROOT / "tests/support/vllm/engine_host.py"), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self._host = Connection(ours.detach())
        self.heard: list[Notice] = []
        self.outputs: dict[str, dict[str, Any]] = {}
        """The last of each request."""
        self.freed: Counter[int] = Counter()
        """Receives, by how often they were."""
        self.begun: set[int] = set()
        self._next = 0
        self._arguments = {"model": str(model), **ARGUMENTS, **arguments}
        self._num_blocks = num_blocks

    def start(self) -> None:
        """Raises RuntimeError with what vLLM raised."""
        nbytes = 3 * 2 * BLOCK_SIZE * 2 * 64 * 2  # layers, K and V, rows, heads, head_dim, bfloat16
        arguments = {"kv_cache_memory_bytes": self._num_blocks * nbytes, **self._arguments}
        self.call("start", arguments, self.front.extra_config)
        ready = self.hear(Ready)
        self.layout: KvLayout = ready.layout
        self.heap = ShmView.open(ready.heap, ready.layout)
        self.keeper = Keeper()
        self.table = GrantTable(
            *(self.heap, self.keeper),  # type: ignore[arg-type]
            engine_id="vllm",
            incarnation=self.front.address.incarnation,
            lease_s=1.0,
            verify_checksums=True,
        )

    def call(self, name: str, *args: Any) -> Any:
        try:
            self._host.send((name, args))
            answer, error = self._host.recv()
        except (EOFError, ConnectionError) as gone:
            raise HostDied from gone
        if error is not None:
            raise RuntimeError(error)
        return answer

    def new_id(self, kind: str) -> str:
        self._next += 1
        return f"{kind}{self._next}"

    def add(
        self,
        request_id: str,
        prompt: list[int],
        ask: Receive | Generate | Send | None = None,
        **sampling: Any,
    ) -> str:
        params = params_of(ask) if ask is not None else None
        self.call("add", request_id, prompt, params, {"max_tokens": 1, **sampling})
        return request_id

    def step(self) -> dict[str, dict[str, Any]]:
        """By request, of those that this step brought something."""
        brought = {output["id"]: output for output in self.call("step")}
        self.outputs |= brought
        return brought

    def notices(self, kind: type[N]) -> list[N]:
        """All of a kind that were told and not yet taken."""
        self._listen()
        found: list[N] = [notice for notice in self.heard if isinstance(notice, kind)]
        self.heard = [notice for notice in self.heard if not isinstance(notice, kind)]
        return found

    def hear(self, kind: type[N]) -> N:
        """The next notice of a kind, after as many steps as it takes."""
        for _ in range(MAX_STEPS):
            self._listen()
            for notice in self.heard:
                if isinstance(notice, kind):
                    self.heard.remove(notice)
                    return notice
            self.step()
        raise AssertionError(f"no {kind.__name__} in {MAX_STEPS} steps, but {self.heard}")

    def _listen(self) -> None:
        for notice in self.front.read():
            self.heard.append(notice)
            if isinstance(notice, Freed):
                self.freed[notice.id] += 1
                self.front.page.retire(notice.id)

    def run(self, *request_ids: str) -> list[dict[str, Any]]:
        """Until these have ended; their last outputs."""
        for _ in range(MAX_STEPS):
            if all(self.has_ended(each) for each in request_ids):
                return [self.outputs[each] for each in request_ids]
            self.step()
        raise AssertionError(f"{request_ids} have not ended in {MAX_STEPS} steps: {self.outputs}")

    def has_ended(self, request_id: str) -> bool:
        return bool(self.outputs.get(request_id, {}).get("finished"))

    def settle(self) -> None:
        """Until nothing makes vLLM step any more."""
        for _ in range(MAX_STEPS):
            if self.call("idle"):
                return
            self.step()
        raise AssertionError("vLLM does not come to rest")

    def forget(self) -> None:
        """Its prefix cache, at rest."""
        self.settle()
        assert self.call("forget_prefixes")

    def generate(self, prompt: list[int], *, after: int | None = None, **sampling: Any) -> dict[str, Any]:
        ask = Generate(after) if after is not None else None
        return self.run(self.add(self.new_id("g"), prompt, ask, **sampling))[0]

    def begin_receive(self, prompt: list[int]) -> tuple[str, int]:
        """vLLM's request and the receive's id."""
        receive = self.front.page.begin()
        assert receive is not None
        self.begun.add(receive)
        return self.add(self.new_id("r"), prompt, Receive(receive, len(prompt))), receive

    def receive(self, prompt: list[int], now: float = 0.0) -> tuple[str, int, Grant]:
        """A parked request and the grant of its blocks."""
        request_id, receive = self.begin_receive(prompt)
        allocated = self.hear(Allocated)
        assert allocated.id == receive
        return request_id, receive, self.grant_of(request_id, allocated, len(prompt), now)

    def grant_of(self, request_id: str, allocated: Allocated, end: int, now: float = 0.0) -> Grant:
        return self.table.open(
            request_id,
            "router",
            [0] * (allocated.matched // BLOCK_SIZE),  # vLLM pins them
            allocated.matched,
            allocated.blocks,
            end,
            now,
        )

    def send(
        self, prompt: list[int], grant: Grant, begin: int = 0, *, lane: int = 0, first: bool = False
    ) -> tuple[str, int]:
        """vLLM's request and the send's id."""
        self._next += 1
        ask = Send(self._next, begin, len(prompt), lane, msgspec.msgpack.encode(grant), first)
        return self.add(self.new_id("s"), prompt, ask), ask.id

    def verify(self, grant: Grant) -> None:
        """All of it has arrived, whole."""
        assert self.table.is_complete(grant.grant_id)
        for layer in range(self.layout.num_layers):
            self.table.verify(grant.grant_id, layer)
        self.settle_grant(grant)

    def settle_grant(self, grant: Grant) -> None:
        """What has arrived is taken, and no writer is left."""
        self.table.seal(grant.grant_id)
        self.table.poll(0.0)

    def close(self) -> None:
        self._host.close()
        self.process.kill()
        self.process.wait()
        if hasattr(self, "heap"):
            self.heap.close()
        self.front.close()


class Peer:
    """Another engine's heap, of the same layout: it takes what vLLM sends, and sends it back."""

    def __init__(self, layout: KvLayout, num_blocks: int = 32, opening: Opening | None = None) -> None:
        incarnation = next(_incarnations)  # vLLM keeps the heaps that it has opened, by this
        self.heap = HostHeap(
            msgspec.structs.replace(layout, num_blocks=num_blocks),
            incarnation=incarnation,
            opening=opening or Opening(),
        )
        self.heap.back(0, num_blocks)
        self.pool = BlockPool(num_blocks)
        self.table = GrantTable(
            *(self.heap, self.pool),
            engine_id="peer",
            incarnation=incarnation,
            lease_s=1.0,
            verify_checksums=True,
        )

    def grant(self, end: int, now: float = 0.0) -> Grant:
        blocks = self.pool.allocate(self.heap.layout.num_blocks_for(end))
        return self.table.open("request", "router", [], 0, blocks, end, now)

    def verify(self, grant: Grant) -> None:
        assert self.table.is_complete(grant.grant_id)
        for layer in range(self.heap.layout.num_layers):
            self.table.verify(grant.grant_id, layer)

    def let_go(self, grant: Grant) -> None:
        self.table.close(grant.grant_id, 0.0)
        self.table.poll(0.0)

    def writer(self, owner: Hosted, grant: Grant, begin: int, end: int, lane: int = 0) -> LaneWriter:
        return self.writer_through(self.heap.attach(owner.heap.address), grant, begin, end, lane)

    def writer_through(self, way: PeerHeap, grant: Grant, begin: int, end: int, lane: int = 0) -> LaneWriter:
        return LaneWriter(*(self.heap, way, grant, lane, begin, end), checksums=True)

    def put(self, owner: Hosted, grant: Grant, blocks: list[int], way: PeerHeap | None = None) -> None:
        """KV of ``[0, grant.end)``, from blocks of ours, into vLLM's."""
        writer = self.writer_through(way or self.heap.attach(owner.heap.address), grant, 0, grant.end)
        writer.claim()
        for layer in range(self.heap.layout.num_layers):
            writer.put_layer(layer, blocks, 0, grant.end)
        writer.finish()

    def close(self) -> None:
        self.heap.close()


def refusal_of(hosted: Hosted) -> Refused:
    """What the connector told before vLLM failed to start."""
    (refused,) = hosted.notices(Refused)
    return refused
