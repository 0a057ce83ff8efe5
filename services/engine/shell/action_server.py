"""The engine's action socket: frames in, one answer each, token streams out.

Owns the ROUTER socket and the sessions; turns every failure into ``Failed`` so that no caller waits for
nothing and no frame ends the service. A session ends when messages were lost, or when its router is silent
or takes nothing; the router is told, and begins anew. Runs in the event loop; the core does the deciding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import structlog

from microserve.protocol import log
from microserve.protocol.bus.codec import ENGINE_REPLY, ENGINE_REQUEST, Frames, decode_tokens
from microserve.protocol.bus.credit import CreditWindow
from microserve.protocol.bus.numbered import NumberedServer
from microserve.protocol.bus.peers import Peer, Peers
from microserve.protocol.bus.queue import StreamQueue
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import InternalError, InvalidRequest, MeshError, ProtocolViolation
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.kv_events import KVEvent, KVEventBatch, encode_batch
from microserve.protocol.process.host import host_facts
from microserve.protocol.security import rights
from microserve.protocol.security.rights import Entrance
from microserve.services.engine.core import trace
from microserve.services.engine.core.request.record import Outbox
from microserve.services.engine.core.state import failed
from microserve.services.engine.shell.door import Core

_NO_WORK = (wire.Ping, wire.Credit, wire.Stats, wire.Snapshot)
"""Messages that leave a step nothing more to do than before."""

_logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Session:
    """What is kept of one peer that has said hello. It owns its requests."""

    queue: StreamQueue[wire.Delta, wire.Finished]
    """A slow router costs memory bounded by its requests' own prompts and ``max_tokens``."""
    is_reader: bool
    """It opened no window, so it generates nothing (WIRE.md 4.1): the index. Its own events tell of it."""


class ActionServer:
    def __init__(
        self,
        bus: Bus,
        address: str,
        core: Core,
        *,
        incarnation: int,
        interval_s: float,
        silence_s: float,
        publish: Callable[[list[KVEvent]], None],
        next_seq: Callable[[], int],
        on_drain: Callable[[], None] = lambda: None,
        stir: Callable[[], None] = lambda: None,
        strict_events: bool = False,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """``interval_s``: of :meth:`beat`. ``on_drain`` is called, under the core's lock, when a peer asks
        the engine to leave; ``stir`` with every message of who is not idle."""
        self._core = core
        self._incarnation = incarnation
        self._clock = core.clock
        self._publish = publish
        self._next_seq = next_seq
        self._on_drain = on_drain
        self._stir = stir
        self._strict_events = strict_events
        self._wall_clock = wall_clock
        self._sessions: Peers[bytes, Session] = Peers(interval_s=interval_s, silence_s=silence_s)
        """By routing id."""
        self._info: wire.EngineInfo | None = None
        self.rejected = 0
        self._socket = NumberedServer(
            bus,
            address,
            self._receive,
            lambda peer: self._lose(peer, "messages were lost"),
            Entrance.ENGINE,
        )

    @property
    def address(self) -> str:
        return self._socket.address

    def open(self, info: wire.EngineInfo) -> None:
        """From now on ``Hello`` is answered."""
        self._info = info

    def _receive(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            message, bulk = ENGINE_REQUEST.decode(frames)
        except ProtocolViolation as error:
            self.rejected += 1
            _logger.warning(log.FRAME_REJECTED, detail=error.detail)
            self._send(peer, failed(0, error))
            return
        try:
            answer = self._handle(peer, message, bulk)
        except MeshError as error:
            self._send(peer, failed(getattr(message, "call_id", 0), error))
        except Exception:
            _logger.exception(log.BUS_HANDLER_FAILED)
            self._send(peer, failed(getattr(message, "call_id", 0), InternalError("see the engine's log")))
        else:
            if answer is not None:
                self._send(peer, *answer)
        self.flush()

    def _handle(
        self, peer: bytes, message: wire.EngineRequest, bulk: list[bytes]
    ) -> tuple[wire.EngineReply, bytes] | tuple[wire.EngineReply] | None:
        rights.check(self._socket.sender_roles, type(message))
        now = self._clock()
        if isinstance(message, wire.Hello):
            self._hello(peer, message, now)
            return None
        next_s = message.next_s if isinstance(message, wire.Ping) else 0.0
        session = self._sessions.heard(peer, now, next_s=next_s)
        if not next_s:
            self._stir()
        if session is None:
            raise ProtocolViolation("say Hello first")
        tokens = decode_tokens(bulk[0]) if bulk else None
        actions = self._core.actions
        with self._core.lock:
            try:
                match message:
                    case wire.PrepRecv():
                        granted = actions.prep_recv(peer, message, tokens, now)
                        if granted is not None:
                            took_s = self._clock() - now
                            trace.granted(message.traceparent, message.request_id, took_s, granted.grant)
                        return _at_once(granted)
                    case wire.RemoteSend():
                        return _at_once(actions.remote_send(peer, message, tokens, now))
                    case wire.StartGenerate():
                        return _at_once(actions.start_generate(peer, message, tokens, now))
                    case wire.Commit():
                        actions.commit(peer, message, now)
                    case wire.Abort():
                        session.value.queue.drop(message.request_id)
                        return (actions.abort(peer, message, now),)
                    case wire.Release():
                        return (actions.release(peer, message, now),)
                    case wire.Drain():
                        if message.incarnation != self._incarnation:
                            raise InvalidRequest("another life of this engine is meant", field="incarnation")
                        self._core.state.draining = True
                        self._on_drain()
                        return (wire.Done(message.call_id),)
                    case wire.Stats():
                        return (self._stats(message.call_id),)
                    case wire.Snapshot():
                        return self._snapshot(message.call_id)
                    case wire.Ping():
                        if message.incarnation != session.incarnation:
                            raise ProtocolViolation("ping of another incarnation; say Hello first")
                    case wire.Credit():
                        session.value.queue.window.grant(message.messages)
                    case _:  # a message without its case would be dropped, and its caller wait for a timeout
                        assert_never(message)
            finally:
                if not isinstance(message, _NO_WORK):
                    self._core.wake()
        return None

    def _hello(self, peer: bytes, message: wire.Hello, now: float) -> None:
        if self._info is None:
            raise InvalidRequest("the engine is still starting")
        with self._core.lock:
            welcome = wire.Welcome(message.call_id, self._info, self._core.load(), paced=True)
        if not self._send(peer, welcome):
            return  # an engine that thaws reads old hellos: one of a closed socket must replace nobody
        fresh = Session(StreamQueue(wire.Delta, message.credit), is_reader=message.credit == 0)
        session, replaced = self._sessions.join(peer, message.router_id, message.incarnation, fresh, now)
        for old in replaced:
            self._drop(old, "replaced")
        self._stir()
        # A router that says hello again counts from its full window, and so do we.
        session.value.queue.window = CreditWindow(message.credit)
        if not session.value.is_reader:
            _logger.info(log.ROUTER_JOINED, router_id=session.name, incarnation=session.incarnation)

    def _stats(self, call_id: int) -> wire.EngineStats:
        counters = dict(self._core.state.counters)
        counters["frames_rejected"] = self.rejected
        counters["records"] = len(self._core.state.records)
        counters["routers"] = len(self._sessions)
        return wire.EngineStats(call_id, self._core.load(), counters, host_facts(self._wall_clock))

    def _snapshot(self, call_id: int) -> tuple[wire.EngineReply, bytes]:
        """Cache contents and the sequence number of the first batch that is not in them, as one cut."""
        outbox, events = self._core.take_output()
        self._core.state.outbox.replies.extend(outbox.replies)
        self._core.state.outbox.deltas.extend(outbox.deltas)
        if events:
            self._publish(list(events))
        blocks = self._core.cached_blocks()
        reply = wire.SnapshotReply(call_id, self._incarnation, self._next_seq())
        batch = KVEventBatch(time.time(), list(blocks), None, self._incarnation)
        return reply, encode_batch(batch, strict=self._strict_events)

    # --- out ---------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send what the core has to say: answers at once, tokens as credit allows, events to all."""
        with self._core.lock:
            taken = self._core.take_output() if self._core.has_output else None
        if taken is not None:  # mostly there is nothing: this comes behind every message and every beat
            self._hand_on(*taken)
        for session in self._sessions:
            while deltas := session.value.queue.take():
                if not self._send(session.key, wire.Deltas(deltas)):
                    break

    def _hand_on(self, outbox: Outbox, events: Sequence[KVEvent]) -> None:
        """Answers and events to the sockets, tokens to the queues of who owns them."""
        if events:
            self._publish(list(events))
        for peer, reply in outbox.replies:
            self._send(peer, reply)
        for peer, delta in outbox.deltas:
            session = self._sessions.find(peer)
            if session is not None:
                session.value.queue.add(
                    *(delta.request_id, delta.offset, delta.token_ids, delta.logprobs, delta.finished, delta),
                    prompt=delta.prompt,
                )

    @property
    def num_sessions(self) -> int:
        """Peers that have said Hello and are not lost; the index is one of them."""
        return len(self._sessions)

    @property
    def are_idle(self) -> bool:
        """All of these, so they say."""
        return self._sessions.are_idle

    @property
    def has_pending(self) -> bool:
        """Is there anything that routers have not been sent?"""
        with self._core.lock:
            return self._core.has_output or any(session.value.queue for session in self._sessions)

    def beat(self, next_s: float = 0.0) -> None:
        """Heartbeat to every router, and the end of those that fell silent. The next one comes in ``next_s``,
        if that is not 0."""
        now = self._clock()
        with self._core.lock:
            load = self._core.load()
        frames = ENGINE_REPLY.encode(wire.Heartbeat(self._incarnation, load, next_s))
        for session in self._sessions:
            self._send_frames(session.key, frames)
        for session, _ in self._sessions.expire(now, next_s):
            self._drop(session, "silent")
            # Should only one direction be dead, the router learns it before it misses us.
            self._send(session.key, failed(0, ProtocolViolation("you were silent; say Hello first")))
        self.flush()

    def _lose(self, peer: bytes, why: str) -> None:
        session = self._sessions.remove(peer)
        if session is not None:
            self._drop(session, why)

    def _drop(self, session: Peer[bytes, Session], why: str) -> None:
        with self._core.lock:
            dropped = self._core.state.drop_owner(session.key, self._clock())
            self._core.wake()
        if not session.value.is_reader:
            _logger.warning(log.ROUTER_LOST, router_id=session.name, why=why, requests=dropped)

    def _send(self, peer: bytes, reply: wire.EngineReply, *bulk: bytes) -> bool:
        """False when the peer is gone or takes nothing: what it asked for is dropped."""
        return self._send_frames(peer, ENGINE_REPLY.encode(reply, *bulk))

    def _send_frames(self, peer: bytes, frames: Frames) -> bool:
        if self._socket.send(peer, frames):
            return True
        self._lose(peer, "unreachable")
        return False

    def close(self) -> None:
        self._socket.close()


def _at_once(answer: wire.EngineReply | None) -> tuple[wire.EngineReply] | None:
    """None: it follows through the core's outbox."""
    return None if answer is None else (answer,)
