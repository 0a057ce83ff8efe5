"""The front of vLLM without vLLM: who plays the rules of vLLM and of the connector is the test, call by call.

Real are the page, the table of grants, the heaps and the writers. What vLLM would do with a request is done
by the rig's methods, in whichever order a test wants.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.local import MemoryHeap, MemoryPeerHeap, MemoryRegistry
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.adapter import Adapter
from microserve.protocol.messages.kv.grant import Grant
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.vllm.front.actions import VllmActions
from microserve.services.engine.vllm.front.arrivals import Arrivals
from microserve.services.engine.vllm.front.output import Output
from microserve.services.engine.vllm.front.receives import Receives
from microserve.services.engine.vllm.front.running import Running
from microserve.services.engine.vllm.front.state import VllmState
from microserve.services.engine.vllm.link import Allocated, Freed, Receive, Received
from microserve.services.engine.vllm.link_ends import Front
from tests.support.kvcache.kv_samples import fill

SIZE = 4
ROUTER = b"router"
ENDS = frozenset({2})
NUMERICS = Numerics("vllm-test")
SOURCE_BLOCKS = [3, 0, 2, 1, 4, 5]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


def layout_of(num_blocks: int) -> KvLayout:
    return KvLayout("m", 2, num_blocks, SIZE, 1, 4, "float32", "r")


class FrontRig:
    """One front whose vLLM has 24 blocks of 4 tokens; senders come and go."""

    def __init__(self, *adapters: Adapter) -> None:
        self.now = 100.0
        self.registry = MemoryRegistry()
        self.heap = MemoryHeap(layout_of(24), incarnation=9, registry=self.registry, num_slots=4)
        self.front = Front(
            incarnation=9, model="m", revision="r", num_receives=4, grant_slots=4, checksums=True
        )
        self.launched: list[Running] = []
        """What vLLM was given, in order."""
        self.cancelled: list[Running] = []
        """What was taken from it."""
        limits = Limits(40, 100, 24, 16, ENDS, adapters)
        self.state = VllmState(limits, NUMERICS, self._launch)
        self.receives = Receives(
            *(self.state, self.front.page, self.heap),
            engine_id="e",
            incarnation=9,
            lease_s=5.0,
            checksums=True,
        )
        self.arrivals = Arrivals(self.state, self.receives, 2)
        self.actions = VllmActions(self.state, self.receives, self.heap.layout, max_num_seqs=8)
        self.free_blocks = set(range(24))
        """Of vLLM's."""
        self.parked: dict[int, list[int]] = {}
        self._calls = 0
        self.answered: Counter[int] = Counter()
        self.replies: list[wire.EngineReply] = []
        self.deltas: list[wire.Delta] = []
        self._senders = 100

    def _launch(self, running: Running) -> None:
        self.launched.append(running)
        running.cancel = lambda: self.cancelled.append(running)

    def close(self) -> None:
        self.front.close()

    # --- a router ------------------------------------------------------------------------------------

    def call(self) -> int:
        self._calls += 1
        return self._calls

    def take(self, answer: wire.EngineReply | None = None) -> list[wire.EngineReply]:
        """Answers since the last time; each call has at most one."""
        outbox = self.state.outbox.take()
        replies = [*([answer] if answer is not None else []), *(reply for _, reply in outbox.replies)]
        for reply in replies:
            call_id = getattr(reply, "call_id", 0)
            self.answered[call_id] += 1
            assert self.answered[call_id] == 1, f"call {call_id} is answered twice: {reply}"
        self.replies += replies
        self.deltas += [delta for _, delta in outbox.deltas]
        return replies

    def prep(self, request_id: str, tokens: list[int], end: int) -> wire.EngineReply | None:
        message = wire.PrepRecv(self.call(), request_id, end, 60.0)
        replies = self.take(self.actions.prep_recv(ROUTER, message, tokens, self.now))
        return replies[-1] if replies else None

    def generate(
        self,
        request_id: str,
        tokens: list[int],
        *,
        begin: int = 0,
        sampling: SamplingParams = GREEDY,
        numerics: str = NUMERICS.name,
        **more: Any,
    ) -> wire.EngineReply | None:
        message = wire.StartGenerate(
            self.call(), request_id, begin, sampling, 60.0, numerics=numerics, **more
        )
        replies = self.take(self.actions.start_generate(ROUTER, message, tokens, self.now))
        return replies[-1] if replies else None

    def commit(self, request_id: str, grant: Grant) -> None:
        message = wire.Commit(self.call(), request_id, grant.grant_id, 60.0, NUMERICS.name)
        self.actions.commit(ROUTER, message, self.now)
        self.take()

    def abort(self, request_id: str) -> None:
        self.take(self.actions.abort(ROUTER, wire.Abort(self.call(), request_id), self.now))

    def granted(self, request_id: str, tokens: list[int], end: int, matched: int = 0) -> Grant:
        """PrepRecv, and vLLM allocates."""
        assert self.prep(request_id, tokens, end) is None, "vLLM has to be asked first"
        self.allocate(self.launched[-1], matched)
        (reply,) = self.take()
        assert isinstance(reply, wire.Granted)
        return reply.grant

    # --- vLLM and the connector ----------------------------------------------------------------------

    def allocate(self, running: Running, matched: int = 0) -> int:
        """It parks the request; the id of the receive."""
        assert isinstance(running.ask, Receive)
        receive = running.ask.id
        num = self.heap.layout.num_blocks_for(running.ask.end - matched)
        blocks = [self.free_blocks.pop() for _ in range(num)]
        self.parked[receive] = blocks
        self.receives.allocated(Allocated(receive, matched, blocks), self.now)
        return receive

    def fate(self, receive: int) -> int:
        return self.front.page.fate(receive)

    def received(self, receive: int) -> None:
        self.receives.cached(Received(receive), self.now)

    def freed(self, receive: int) -> None:
        self.free_blocks.update(self.parked.pop(receive, []))
        self.receives.freed(Freed(receive), self.now)

    def say(self, running: Running, *token_ids: int, finish: str = "", stop: int | None = None) -> None:
        self.state.take_output(running, Output(list(token_ids), finish=finish, stop=stop), self.now)

    def accept(self, running: Running) -> None:
        self.state.accepted(running)

    def poll(self, after_s: float = 0.0) -> None:
        self.now += after_s
        self.arrivals.poll(self.now)
        self.state.expire(self.now)

    # --- a sender ------------------------------------------------------------------------------------

    def writer(self, grant: Grant, lane: int = 0) -> LaneWriter:
        """It has claimed its lane."""
        self._senders += 1
        source = MemoryHeap(layout_of(6), incarnation=self._senders, registry=self.registry)
        fill(source, SOURCE_BLOCKS, 24, 4)
        peer = MemoryPeerHeap(source, self.heap, self.registry)
        writer = LaneWriter(source, peer, grant, lane, 0, grant.end, checksums=True)
        writer.claim()
        return writer

    def put(self, writer: LaneWriter, grant: Grant, first_token: int | None = None) -> None:
        for layer in range(2):
            writer.put_layer(layer, SOURCE_BLOCKS, 0, grant.end)
        if first_token is not None:
            writer.set_first_token(first_token)

    def send(self, grant: Grant, first_token: int | None = None) -> None:
        """All of it."""
        writer = self.writer(grant)
        self.put(writer, grant, first_token)
        writer.finish()

    def check_idle(self) -> None:
        """Nothing is left of anything."""
        self.receives.check_integrity()
        assert not self.state.live and not self.receives.has_any and not self.parked
        assert self.receives.pool.num_quarantined == 0 and len(self.free_blocks) == 24
        assert all(record.is_idle for record in self.state.records)
