"""An engine that computes nothing: it speaks WIRE.md 4 over a real socket and writes down what it is told.

What it holds for a request is held as a real engine would, so a test can ask that nothing is left; it decodes
only when every token of its grant was sent by somebody, so a gap shows as a stream that never starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from microserve.kvcache.prefix.hash import block_hashes, root_hash
from microserve.protocol.bus.codec import ENGINE_REPLY, ENGINE_REQUEST, decode_tokens
from microserve.protocol.bus.credit import CreditWindow
from microserve.protocol.bus.numbered import NumberedServer
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import InvalidInterval, MeshError, UnknownRequest
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv import kv_events as kv
from microserve.protocol.messages.kv.coding import Coding
from microserve.protocol.messages.kv.grant import Grant, HeapAddress
from microserve.protocol.types import WIRE_VERSION
from tests.support.bus.lossy_bus import LossyBus
from tests.support.router.fabric import Fabric

ANY = "tcp://127.0.0.1:0"
VOCAB_SIZE = 1000
BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096


def output_token(position: int) -> int:
    """The output token at an offset: the same on every engine, as if sampled from one model."""
    return (7 * position + 3) % VOCAB_SIZE


@dataclass
class Held:
    """Everything that the engine holds under one request id."""

    tokens: list[int]
    grant: Grant | None = None
    commit: int | None = None
    generate: wire.StartGenerate | None = None
    generating_grant: Grant | None = None
    sends: dict[int, wire.RemoteSend] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        return self.grant is None and self.generate is None and not self.sends


class ScriptedEngine:
    def __init__(
        self,
        bus: Bus,
        fabric: Fabric,
        engine_id: str,
        incarnation: int = 1,
        *,
        address: str = ANY,
        interval_s: float = 0.05,
        **info: Any,
    ) -> None:
        self.calls: list[wire.EngineRequest] = []
        """Actions in order of arrival, without Hello, Ping, Credit and Snapshot."""
        self.with_tokens: list[bool] = []
        """Whether each of them brought the prompt."""
        self.credits: list[int] = []
        self.hellos: list[wire.Hello] = []
        self.pings = 0
        self.held: dict[str, Held] = {}
        self.matched = 0
        """Tokens of any prompt that PrepRecv finds in the cache, cut to whole blocks and to the grant."""
        self.cached: list[list[int]] = []
        """Prefixes that :meth:`store` has put there."""
        self.load = wire.EngineLoad()
        self.mute_heartbeats = False
        self.progresses = False  # every heartbeat shows more progress than the last
        self.silent = False  # answers nothing and sends nothing
        self.manual = False  # does not decode: the test calls :meth:`emit`
        self.coding: Coding | None = None  # of sends that name a codec
        self.errs: Callable[[Held], bool] = lambda held: False  # whose last output token is a wrong one
        self.failures: dict[type, MeshError] = {}
        """Answer actions of a type with an error."""
        self.paused: set[str] = set()
        """Names of actions that are not answered yet; 'decode': no deltas."""
        self.incarnation = incarnation
        self.num_deltas = 0  # messages that were sent
        self._fabric = fabric
        self._waiting: list[tuple[bytes, wire.EngineRequest]] = []
        self._window = CreditWindow(0)
        self._peer = b""
        self._pending: dict[str, wire.Delta] = {}
        self._grants = 0
        self._stored: list[kv.KVEvent] = []
        self._next_seq = 0
        self._seen = asyncio.Event()
        self.losses = 0  # times that messages to it were lost
        self.lossy = LossyBus(bus)
        self._socket = NumberedServer(self.lossy, address, self._receive, self._take_loss)
        self._events = bus.publisher(ANY)
        self.info = wire.EngineInfo(
            **{
                "engine_id": engine_id,
                "incarnation": incarnation,
                "address": self._socket.address,
                "events_address": self._events.address,
                "replay_address": "",
                "model": "scripted",
                "labels": [],
                "block_size": BLOCK_SIZE,
                "num_blocks": 1000,
                "num_layers": 2,
                "max_model_len": MAX_MODEL_LEN,
                "vocab_size": VOCAB_SIZE,
                "eos_token_ids": [2],
                "layout_hash": "layout",
                "heap": "shm",
                "wire_version": WIRE_VERSION,
                **info,
            }
        )
        fabric.changed.append(self._advance)
        self._beating = asyncio.create_task(self._beat(interval_s))
        self.engine_id = engine_id

    def store(self, tokens: list[int], salt: str = "", adapter: str = "") -> None:
        """Have whole blocks of a prefix in the cache, and publish that."""
        whole = tokens[: len(tokens) // BLOCK_SIZE * BLOCK_SIZE]
        self.cached.append(whole)
        root = root_hash(self.info.model, salt=salt, adapter=adapter)
        if hashes := block_hashes(whole, BLOCK_SIZE, root):
            # The parent of a first block is the root itself where the event says no salt.
            self._stored.append(kv.BlockStored(list(hashes), root, whole, BLOCK_SIZE))
            self._publish(self._stored[-1:])

    def _publish(self, events: list[kv.KVEvent]) -> None:
        payload = kv.encode_batch(kv.KVEventBatch(0.0, events, None, self.incarnation))
        self._events.send(kv.publish_frames("kv", self._next_seq, payload))
        self._next_seq += 1

    def _match(self, tokens: list[int], end: int) -> int:
        longest = self.matched
        for prefix in self.cached:
            if tokens[: len(prefix)] == prefix:
                longest = max(longest, len(prefix))
        return min(longest, end) // BLOCK_SIZE * BLOCK_SIZE

    def close(self) -> None:
        self._beating.cancel()
        self._socket.close()
        self._events.close()
        if self._advance in self._fabric.changed:
            self._fabric.changed.remove(self._advance)

    def is_clean(self) -> bool:
        """No grant, send or stream is left; an idle record of tokens is no resource."""
        return all(held.is_idle for held in self.held.values())

    def of(self, kind: type) -> list[Any]:
        return [call for call in self.calls if isinstance(call, kind)]

    async def saw(self, kind: type, count: int = 1) -> Any:
        """Wait until ``count`` actions of a kind have come; the last of them."""
        async with asyncio.timeout(30):
            while len(self.of(kind)) < count:
                self._seen.clear()
                await self._seen.wait()
        return self.of(kind)[count - 1]

    def resume(self, *kinds: str) -> None:
        """Answer what waited."""
        self.paused -= set(kinds)
        waiting, self._waiting = self._waiting, []
        for peer, message in waiting:
            self._act(peer, message)
        self._advance()

    def emit(self, *deltas: wire.Delta) -> None:
        """One Deltas message, credit or not."""
        self.num_deltas += 1
        self._send(self._peer, wire.Deltas(list(deltas)))

    def die(self) -> None:
        """Be lost at once: another life is heard at the address, and then nothing."""
        self._send(self._peer, wire.Heartbeat(self.incarnation + 1, self.load))
        self.silent = True

    def refuse(self, detail: str, code: str = "protocol_violation") -> None:
        """What an engine answers to a router that it does not know."""
        self._send(self._peer, wire.Failed(0, code, detail))

    def finish(self, request_id: str, offset: int, reason: str = "length", **fields: Any) -> None:
        """End a stream by hand."""
        held = self.held.get(request_id)
        if held is not None:
            held.generate = held.generating_grant = None
        usage = wire.Usage(output_tokens=offset)
        finished = wire.Finished(reason, usage, wire.Timings(), **fields)
        self.emit(wire.Delta(request_id, offset, [], finished=finished))

    # --- messages ----------------------------------------------------------------------------------

    async def _beat(self, interval_s: float) -> None:
        while True:
            if self.progresses:
                self.load = msgspec.structs.replace(self.load, progress=self.load.progress + 1)
            if self._peer and not self.mute_heartbeats:
                self._send(self._peer, wire.Heartbeat(self.incarnation, self.load))
            if self._stored and not self.mute_heartbeats:
                self._publish([])  # who subscribed too late for an event sees the gap
            await asyncio.sleep(interval_s)

    def _take_loss(self, peer: bytes) -> None:
        self.losses += 1

    def _send(self, peer: bytes, message: wire.EngineReply, *bulk: bytes) -> None:
        if not self.silent:
            self._socket.send(peer, ENGINE_REPLY.encode(message, *bulk))

    def _receive(self, peer: bytes, frames: list[bytes]) -> None:
        message, bulk = ENGINE_REQUEST.decode(frames)
        match message:
            case wire.Ping():
                self.pings += 1
                return
            case wire.Credit(messages):
                self.credits.append(messages)
                self._window.grant(messages)
                self._flush()
                return
            case wire.Hello():
                self.hellos.append(message)
                self._peer, self._window = peer, CreditWindow(message.credit)
                self._send(peer, wire.Welcome(message.call_id, self.info, self.load))
                return
            case wire.Snapshot():
                batch = kv.encode_batch(kv.KVEventBatch(0.0, self._stored, None, self.incarnation))
                reply = wire.SnapshotReply(message.call_id, self.incarnation, self._next_seq)
                self._send(peer, reply, batch)
                return
        self.calls.append(message)
        self.with_tokens.append(bool(bulk))
        self._seen.set()
        if self.silent:
            return
        if bulk:
            request_id = getattr(message, "request_id", "")
            held = self.held.get(request_id)
            if held is None or held.is_idle:
                self.held[request_id] = Held(decode_tokens(bulk[0]))
        self._act(peer, message)

    def _act(self, peer: bytes, message: wire.EngineRequest) -> None:
        if type(message).__name__ in self.paused:
            self._waiting.append((peer, message))
            return
        call_id = getattr(message, "call_id", 0)
        try:
            failure = self.failures.get(type(message))
            if failure is not None:
                raise failure
            answer = self._handle(message)
        except MeshError as error:
            self._send(peer, wire.Failed(call_id, error.code, error.detail, error.field, error.retry_after_s))
            return
        if answer is not None:
            self._send(peer, answer)
        self._advance()

    def _handle(self, message: wire.EngineRequest) -> wire.EngineReply | None:
        match message:
            case wire.PrepRecv():
                return self._prep_recv(message)
            case wire.RemoteSend():
                return self._remote_send(message)
            case wire.StartGenerate():
                return self._start_generate(message)
            case wire.Commit():
                self._record(message.request_id).commit = message.call_id
                return None
            case wire.Release():
                self._record(message.request_id).grant = None
                return wire.Done(message.call_id)
            case wire.Abort():
                self.held.pop(message.request_id, None)
                self._waiting = [
                    (p, m) for p, m in self._waiting if getattr(m, "request_id", "") != message.request_id
                ]
                return wire.Done(message.call_id)
        raise AssertionError(f"unexpected {message}")

    def _record(self, request_id: str) -> Held:
        if request_id not in self.held:
            raise UnknownRequest(f"no tokens for {request_id}")
        return self.held[request_id]

    def _prep_recv(self, message: wire.PrepRecv) -> wire.Granted:
        held = self._record(message.request_id)
        self._grants += 1
        matched = self._match(held.tokens, message.end)
        num_blocks = -(-(message.end - matched) // BLOCK_SIZE)
        held.grant = Grant(
            grant_id=f"{self.engine_id}-{self.incarnation}-{self._grants}",
            engine_id=self.engine_id,
            incarnation=self.incarnation,
            slot=0,
            generation=self._grants,
            matched=matched,
            end=message.end,
            blocks=list(range(num_blocks)),
            block_size=BLOCK_SIZE,
            layout_hash="layout",
            heap=HeapAddress("shm", "host", 1, 3, 4096, self.incarnation),
            lease_s=30.0,
            adapter=next((each for each in self.info.adapters if each.name == message.adapter), None),
        )
        return wire.Granted(message.call_id, held.grant)

    def _remote_send(self, message: wire.RemoteSend) -> wire.Sent:
        held, grant = self._record(message.request_id), message.grant
        if not grant.matched <= message.begin < message.end <= min(grant.end, len(held.tokens)):
            raise InvalidInterval(f"[{message.begin}, {message.end})")
        first = None
        if message.sampling is not None:
            assert message.end == len(held.tokens)
            first = output_token(message.num_output_tokens)
        self._fabric.put(grant, message.begin, message.end, message.lane, first)
        count = message.end - message.begin
        timings = wire.Timings(queued_s=0.001, prefill_s=0.002, transfer_s=0.001)
        said = (count, 0, count, count * 64, timings, first, None, "shm")
        return wire.Sent(message.call_id, message.request_id, *said, self.coding if message.codec else None)

    def _start_generate(self, message: wire.StartGenerate) -> wire.Accepted:
        held = self._record(message.request_id)
        grant = held.grant if message.grant_id is not None else None
        if message.grant_id is not None and (grant is None or grant.grant_id != message.grant_id):
            raise UnknownRequest(f"no grant {message.grant_id}")
        if message.begin != (grant.end if grant else 0):
            raise InvalidInterval(f"begin {message.begin}")
        assert not message.await_first or message.begin == len(held.tokens)
        held.generate, held.generating_grant, held.grant = message, grant, None
        return wire.Accepted(message.call_id)

    # --- what would be computed --------------------------------------------------------------------

    def _is_filled(self, grant: Grant) -> bool:
        have = self._fabric.covered.get(grant.grant_id, set())
        return set(range(grant.matched, grant.end)) <= have

    def _advance(self) -> None:
        for request_id, held in list(self.held.items()):
            if held.commit is not None and held.grant is not None and self._is_filled(held.grant):
                num_tokens = held.grant.end // BLOCK_SIZE * BLOCK_SIZE
                self._send(self._peer, wire.Committed(held.commit, num_tokens))
                self.cached.append(held.tokens[:num_tokens])
                held.grant = held.commit = None
            if held.generate is not None and not self.manual and "decode" not in self.paused:
                self._decode(request_id, held, held.generate)

    def _decode(self, request_id: str, held: Held, start: wire.StartGenerate) -> None:
        grant = held.generating_grant
        if grant is not None and not self._is_filled(grant):
            return
        if start.await_first:
            assert grant is not None
            assert self._fabric.first_tokens[grant.grant_id] == output_token(start.num_output_tokens)
        begin, end = start.num_output_tokens + start.await_first, start.sampling.max_tokens
        received = grant.end - grant.matched if grant else 0
        num_prompt = len(held.tokens) - start.num_output_tokens
        usage = wire.Usage(num_prompt, grant.matched if grant else 0, received, end)
        finished = wire.Finished("length", usage, wire.Timings(0.001, 0.001, 0.001, 0.001))
        for position in range(begin, end):
            token = output_token(position) + (position == end - 1 and self.errs(held))
            self._queue(wire.Delta(request_id, position, [token]))
        self._queue(wire.Delta(request_id, end, [], finished=finished))
        held.generate = held.generating_grant = None
        del self.held[request_id]

    def _queue(self, delta: wire.Delta) -> None:
        waiting = self._pending.get(delta.request_id)
        if waiting is not None:
            delta = wire.Delta(
                delta.request_id,
                waiting.offset,
                waiting.token_ids + delta.token_ids,
                finished=delta.finished,
            )
        self._pending[delta.request_id] = delta
        self._flush()

    def _flush(self) -> None:
        if self._pending and self._window.take():
            deltas, self._pending = list(self._pending.values()), {}
            self.emit(*deltas)
