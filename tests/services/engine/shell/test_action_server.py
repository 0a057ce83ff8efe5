"""The engine's action socket: every call answered once, junk survived, tokens by credit, owners obeyed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.protocol.bus.codec import ENGINE_REPLY, ENGINE_REQUEST, encode_tokens
from microserve.protocol.bus.numbered import Outgoing
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import MAX_LANES, Grant, HeapAddress
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import KVEvent
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.core import EngineCore
from microserve.services.engine.shell.action_server import ActionServer
from microserve.services.simulation.engine.hash_runner import HashRunner, expected_tokens, hash_layout
from tests.support.bus.direct_bus import DirectBus
from tests.support.bus.junk import junk

VOCAB = 500
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
PROMPT = list(range(10, 31))


class Rig:
    """An action server on a core that the test steps by hand."""

    def __init__(self) -> None:
        self.now = 50.0
        self.events: list[KVEvent] = []
        self.batches = 0
        layout = hash_layout(num_blocks=64)
        heap = MemoryHeap(layout, incarnation=5, registry=MemoryRegistry(), num_slots=8)
        self.core = EngineCore(
            engine_id="e",
            incarnation=5,
            model="hash",
            heap=heap,
            runner=HashRunner(heap.data, layout, vocab_size=VOCAB),
            limits=Limits(200, VOCAB, 64, 32, frozenset({0})),
            max_num_seqs=8,
            max_num_batched_tokens=16,
            lease_s=5.0,
            checksums=True,
            clock=lambda: self.now,
        )
        bus = DirectBus()
        self.server = ActionServer(
            bus,
            "direct://engine",
            self.core,
            incarnation=5,
            interval_s=0.5,
            silence_s=3.0,
            publish=self._publish,
            next_seq=lambda: self.batches,
        )
        self.socket = bus.servers[0]
        self.server.open(
            wire.EngineInfo(
                "e", 5, "a", "b", "c", "hash", [], 4, 64, 2, 200, VOCAB, [0], layout.layout_hash, "memory", 1
            )
        )

    def _publish(self, events: list[KVEvent]) -> None:
        self.events.extend(events)
        self.batches += 1

    def send(self, message: Any, *bulk: bytes, peer: bytes = b"p") -> list[Any]:
        """Deliver one message; what it sent to that peer meanwhile."""
        self.socket.sent.clear()
        self.socket.receive(peer, ENGINE_REQUEST.encode(message, *bulk))
        return self.received(peer)

    def received(self, peer: bytes = b"p") -> list[Any]:
        replies = [ENGINE_REPLY.decode(frames)[0] for to, frames in self.socket.sent if to == peer]
        self.socket.sent.clear()
        return replies

    def beat_for(self, seconds: float) -> None:
        """Time passes as in a healthy engine."""
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            self.server.beat()

    def hello(self, peer: bytes = b"p", incarnation: int = 1, credit: int = 100, router: str = "r") -> Any:
        return self.send(wire.Hello(1, router, incarnation, credit), peer=peer)

    def run(self) -> None:
        while self.core.step():
            self.now += 0.001
        self.server.flush()

    def close(self) -> None:
        for record in self.core.state.records:
            self.core.state.abort(record, self.now)
        self.run()
        pool = self.core.memory.pool
        assert pool.num_free == pool.num_blocks
        self.core.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def start(call_id: int = 2, request_id: str = "q") -> wire.StartGenerate:
    return wire.StartGenerate(call_id, request_id, 0, PARAMS, 30.0)


def tokens_of(replies: list[Any]) -> list[int]:
    return [t for r in replies if isinstance(r, wire.Deltas) for d in r.deltas for t in d.token_ids]


def test_a_request_from_hello_to_finish(rig: Rig) -> None:
    [welcome] = rig.hello()
    assert isinstance(welcome, wire.Welcome)
    [accepted] = rig.send(start(), encode_tokens(PROMPT))
    assert accepted == wire.Accepted(2)
    rig.run()
    replies = rig.received()

    assert expected_tokens(PROMPT, PARAMS, vocab_size=VOCAB) == tokens_of(replies)
    assert replies[-1].deltas[-1].finished.reason == "length"


def test_nothing_is_done_before_hello(rig: Rig) -> None:
    [failed] = rig.send(start(), encode_tokens(PROMPT))
    assert failed.code == "protocol_violation"
    assert failed.call_id == 2
    assert len(rig.core.state.records) == 0


def test_without_credit_tokens_wait_and_merge(rig: Rig) -> None:
    rig.hello(credit=1)
    rig.send(start(), encode_tokens(PROMPT))
    while rig.core.step():
        rig.server.flush()
    first = rig.received()
    assert len([r for r in first if isinstance(r, wire.Deltas)]) == 1
    rest = rig.send(wire.Credit(1))
    assert len(rest) == 1

    assert expected_tokens(PROMPT, PARAMS, vocab_size=VOCAB) == tokens_of(first) + tokens_of(rest)
    assert rest[0].deltas[0].offset == len(tokens_of(first))


@pytest.mark.parametrize("lane", [-1, MAX_LANES, 1 << 40])
@pytest.mark.parametrize("sends", [0, len(PROMPT)])
def test_a_lane_that_a_grant_does_not_have_is_refused_before_anything_is_computed(
    rig: Rig, lane: int, sends: int
) -> None:
    rig.hello()
    [granted] = rig.send(wire.PrepRecv(2, "q", len(PROMPT), 30.0), encode_tokens(PROMPT))
    end = len(PROMPT)

    message = wire.RemoteSend(3, "q", end - sends, end, granted.grant, lane, 30.0)
    [refused] = rig.send(message)

    assert (refused.call_id, refused.code, refused.field) == (3, "invalid_request", "lane")
    assert not rig.core.step(), "there is nothing to do"
    rig.send(wire.Abort(4, "q"))


def test_a_silent_router_loses_its_requests(rig: Rig) -> None:
    rig.hello()
    rig.hello(peer=b"other", router="s")
    rig.send(start(), encode_tokens(PROMPT))
    rig.beat_for(2.0)
    rig.send(wire.Ping(1), peer=b"other")
    rig.beat_for(2.0)

    assert len(rig.core.state.records) == 0
    assert any(isinstance(r, wire.Heartbeat) for r in rig.received(b"other"))
    assert rig.send(wire.Ping(1))[0].code == "protocol_violation"


def test_a_new_life_of_a_router_ends_what_the_old_one_began(rig: Rig) -> None:
    rig.hello(peer=b"old", incarnation=1)
    rig.send(start(), encode_tokens(PROMPT), peer=b"old")
    rig.hello(peer=b"new", incarnation=2)

    assert len(rig.core.state.records) == 0


def test_a_snapshot_is_one_cut_of_cache_and_sequence(rig: Rig) -> None:
    rig.hello()
    rig.send(start(), encode_tokens(PROMPT))
    rig.run()
    rig.socket.sent.clear()
    rig.socket.receive(b"p", ENGINE_REQUEST.encode(wire.Snapshot(9)))
    [(_, frames)] = [s for s in rig.socket.sent]
    reply, bulk = ENGINE_REPLY.decode(frames)

    assert isinstance(reply, wire.SnapshotReply)
    assert (reply.epoch, reply.seq) == (5, rig.batches)
    hashes = [h for event in decode_batch(bulk[0]).events for h in event.block_hashes]  # type: ignore[union-attr]
    assert len(hashes) == rig.core.memory.cache.num_blocks == (len(PROMPT) + 4) // 4


def test_a_hundred_thousand_junk_frames(rig: Rig) -> None:
    """Answered with an error or dropped; afterwards the engine serves and holds nothing."""
    rig.hello()
    grant = Grant("e/5/0/1", "e", 5, 0, 1, 0, 8, [1, 2], 4, "x", HeapAddress("memory", "h", 1, 2, 3, 5), 1.0)
    messages: list[Any] = [
        wire.Hello(1, "r", 1, 4),
        wire.PrepRecv(2, "r", -1, 3.0),
        wire.RemoteSend(3, "r", 0, 8, grant, 0, 3.0, PARAMS),
        wire.StartGenerate(4, "r", 0, PARAMS, 3.0),
        wire.Commit(5, "r", "g", 3.0),
        wire.Abort(6, "r"),
        wire.Release(7, "r", "g"),
        wire.Stats(8),
        wire.Snapshot(9),
        wire.Ping(1),
        wire.Credit(5),
    ]
    samples = [ENGINE_REQUEST.encode(message)[1] for message in messages]
    header = ENGINE_REQUEST.encode(messages[0])[0]
    for number, frames in enumerate(junk(1, header, samples, 100_000)):
        rig.socket.receive(b"p" if number % 3 else b"stranger", frames)
        if number % 500 == 0:
            rig.core.step()
            rig.socket.sent.clear()
    for session_peer in (b"p", b"stranger"):
        rig.core.state.drop_owner(session_peer, rig.now)
    rig.core.state.draining = False
    rig.hello(incarnation=77)
    rig.send(start(request_id="after"), encode_tokens(PROMPT))
    rig.run()

    assert expected_tokens(PROMPT, PARAMS, vocab_size=VOCAB) == tokens_of(rig.received())
    assert rig.server.rejected > 10_000


def test_tokens_of_an_aborted_life_never_reach_the_next_one(rig: Rig) -> None:
    """Without credit, with tokens that the step has just left, and the same id started again."""
    rig.hello(credit=0)
    rig.send(start(), encode_tokens(PROMPT))
    while not rig.core.state.outbox.deltas:
        assert rig.core.step()
    rig.send(wire.Abort(3, "q"))
    rig.send(start(call_id=4), encode_tokens(PROMPT))
    rig.run()

    assert expected_tokens(PROMPT, PARAMS, vocab_size=VOCAB) == tokens_of(rig.send(wire.Credit(9)))


# --- losses ----------------------------------------------------------------------------------------


class Numbering:
    """A router that numbers what it sends."""

    def __init__(self, rig: Rig, peer: bytes = b"p") -> None:
        self.rig, self.peer = rig, peer
        self.outgoing = Outgoing(3)

    def send(self, message: Any, *bulk: bytes, lost: bool = False) -> list[Any]:
        header, *frames = ENGINE_REQUEST.encode(message, *bulk)
        stamped = [self.outgoing.stamp(header), *frames]
        self.rig.socket.sent.clear()
        if not lost:
            self.rig.socket.receive(self.peer, stamped)
        sent = [frames for to, frames in self.rig.socket.sent if to == self.peer]
        return [ENGINE_REPLY.decode([frames[0][:2], *frames[1:]])[0] for frames in sent]


def test_a_router_whose_messages_were_lost_has_no_session_and_no_requests(rig: Rig) -> None:
    router = Numbering(rig)
    router.send(wire.Hello(1, "r", 1, 100))
    router.send(start(), encode_tokens(PROMPT))
    assert len(rig.core.state.records) == 1
    assert router.send(wire.Ping(1)) == []
    router.send(wire.Abort(3, "q"), lost=True)

    [failed] = router.send(wire.Ping(1))
    assert (failed.code, failed.call_id) == ("protocol_violation", 0)
    assert len(rig.core.state.records) == 0
    [welcome] = router.send(wire.Hello(4, "r", 1, 100))
    assert isinstance(welcome, wire.Welcome)


def test_a_hello_that_reveals_a_loss_begins_anew(rig: Rig) -> None:
    router = Numbering(rig)
    router.send(wire.Hello(1, "r", 1, 100))
    router.send(start(), encode_tokens(PROMPT))
    router.send(wire.Ping(1), lost=True)

    [welcome] = router.send(wire.Hello(4, "r", 1, 100))
    assert isinstance(welcome, wire.Welcome)
    assert len(rig.core.state.records) == 0
    assert router.send(wire.Ping(1)) == []


def test_a_silent_router_is_told_so_at_once(rig: Rig) -> None:
    rig.hello()
    rig.socket.sent.clear()
    rig.beat_for(4.0)

    last = rig.received()[-1]
    assert (last.code, last.call_id) == ("protocol_violation", 0)


def test_an_engine_that_stood_still_calls_nobody_silent(rig: Rig) -> None:
    rig.hello()
    rig.beat_for(1.0)
    rig.now += 60.0
    rig.server.beat()

    assert rig.send(wire.Ping(1)) == []


def test_a_router_that_takes_nothing_loses_its_requests(rig: Rig) -> None:
    rig.hello()
    rig.hello(peer=b"other", router="s")
    rig.send(start(), encode_tokens(PROMPT))
    rig.socket.gone.add(b"p")
    rig.run()

    assert len(rig.core.state.records) == 0
    rig.socket.gone.clear()
    assert rig.send(wire.Ping(1))[0].code == "protocol_violation"
    assert rig.send(wire.Ping(1), peer=b"other") == []


def test_a_new_connection_of_a_router_ends_what_the_old_one_began(rig: Rig) -> None:
    rig.hello(peer=b"old")
    rig.send(start(), encode_tokens(PROMPT), peer=b"old")
    rig.hello(peer=b"new")

    assert len(rig.core.state.records) == 0
    assert rig.send(wire.Ping(1), peer=b"old")[0].code == "protocol_violation"
    assert rig.send(wire.Ping(1), peer=b"new") == []


def test_a_hello_of_a_connection_that_is_gone_replaces_nobody(rig: Rig) -> None:
    rig.hello(peer=b"new")
    rig.send(start(), encode_tokens(PROMPT), peer=b"new")
    rig.socket.gone.add(b"old")
    rig.hello(peer=b"old")

    assert len(rig.core.state.records) == 1
    assert rig.send(wire.Ping(1), peer=b"new") == []
