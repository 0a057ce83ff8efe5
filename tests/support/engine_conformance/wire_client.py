"""One connection to one engine, as WIRE.md 4 has it: hello, calls, streams by credit, pings.

All that the suite knows of an engine comes through here. Every wait has a deadline. Knows no backend, and
nothing of the repository but the codec and the bus.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from microserve.protocol.bus.codec import ENGINE_REPLY, ENGINE_REQUEST, Frames, encode_tokens
from microserve.protocol.bus.transport import Bus
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import Grant
from microserve.protocol.messages.request.sampling import SamplingParams

T = TypeVar("T")

ANSWER_S = 180.0
TTL_S = 400.0
PING_S = 0.25
CREDIT = 1_000


class RefusedError(Exception):
    """The engine's ``Failed``."""

    def __init__(self, failed: wire.Failed) -> None:
        super().__init__(f"{failed.code}: {failed.detail} (field {failed.field})")
        self.failed = failed
        self.code, self.field, self.detail = failed.code, failed.field, failed.detail


@dataclass
class Stream:
    """The deltas of one request, in order and without a gap."""

    token_ids: list[int] = field(default_factory=list)
    first_offset: int | None = None
    logprobs: list[wire.TokenLogprob] = field(default_factory=list)
    prompt_rows: list[bytes] = field(default_factory=list)
    finished: wire.Finished | None = None
    num_messages: int = 0

    def take(self, delta: wire.Delta) -> None:
        assert self.finished is None, f"{delta} behind the end of its stream"
        if self.first_offset is None:
            self.first_offset = delta.offset
        assert delta.offset == self.first_offset + len(self.token_ids), f"a gap or a repetition: {delta}"
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.prompt is not None:
            self.prompt_rows.append(delta.prompt.rows)
        self.finished = delta.finished
        self.num_messages += 1


class WireClient:
    """A router's end. ``hello`` first; it pings from then on."""

    def __init__(self, bus: Bus, address: str, server_key: str, *, router_id: str = "") -> None:
        self.router_id = router_id or f"conformance-{secrets.token_hex(4)}"
        self.incarnation = secrets.randbits(61) | 1
        self.heartbeats: list[wire.Heartbeat] = []
        self.streams: dict[str, Stream] = {}
        self.told: list[wire.Failed] = []
        """Failures that answer no call."""
        self.gives_credit = True
        self._ids = 0
        self._waiting: dict[int, asyncio.Future[tuple[wire.EngineReply, list[bytes]]]] = {}
        self._news = asyncio.Event()
        self._pinging: asyncio.Task[None] | None = None
        self._broken: Exception | None = None
        self._socket = bus.client(address, self._receive, server_key=server_key)
        self.info: wire.EngineInfo
        """From ``hello`` on."""

    def close(self) -> None:
        """Fall silent, as one who died."""
        self.rest()
        self._socket.close()

    def rest(self) -> None:
        """Send no ping any more."""
        if self._pinging is not None:
            self._pinging.cancel()
            self._pinging = None

    # --- what is sent -------------------------------------------------------------------------------

    def send(self, message: wire.EngineRequest, *bulk: bytes) -> None:
        self.send_frames(ENGINE_REQUEST.encode(message, *bulk))

    def send_frames(self, frames: Frames) -> None:
        assert self._socket.send(frames)

    def begin(
        self, build: Callable[[int], wire.EngineRequest], *bulk: bytes
    ) -> asyncio.Future[tuple[wire.EngineReply, list[bytes]]]:
        """Send a call; its answer comes in the future, or :class:`RefusedError` does."""
        self._ids += 1
        future = self._waiting[self._ids] = asyncio.get_running_loop().create_future()
        self.send(build(self._ids), *bulk)
        return future

    async def ask(
        self, answer: type[T], build: Callable[[int], wire.EngineRequest], *bulk: bytes
    ) -> tuple[T, list[bytes]]:
        async with asyncio.timeout(ANSWER_S):
            reply, frames = await self.begin(build, *bulk)
        assert isinstance(reply, answer), f"expected {answer.__name__}, got {reply}"
        return reply, frames

    # --- the actions --------------------------------------------------------------------------------

    async def hello(self, *, credit: int = CREDIT, pings: bool = True) -> wire.Welcome:
        welcome, _ = await self.ask(
            wire.Welcome, lambda call: wire.Hello(call, self.router_id, self.incarnation, credit)
        )
        self.info = welcome.info
        if pings and self._pinging is None:
            self._pinging = asyncio.create_task(self._ping())
        return welcome

    async def prep_recv(
        self,
        request_id: str,
        end: int,
        tokens: list[int] | None,
        *,
        salt: str = "",
        ttl_s: float = TTL_S,
        adapter: str = "",
    ) -> Grant:
        build = lambda call: wire.PrepRecv(call, request_id, end, ttl_s, salt, adapter)  # noqa: E731
        granted, _ = await self.ask(wire.Granted, build, *bulk(tokens))
        return granted.grant

    def begin_send(
        self,
        request_id: str,
        begin: int,
        end: int,
        grant: Grant,
        tokens: list[int] | None,
        *,
        lane: int = 0,
        sampling: SamplingParams | None = None,
        salt: str = "",
        ttl_s: float = TTL_S,
        adapter: str = "",
    ) -> asyncio.Future[tuple[wire.EngineReply, list[bytes]]]:
        return self.begin(
            lambda call: wire.RemoteSend(
                call, request_id, begin, end, grant, lane, ttl_s, sampling, salt, adapter=adapter
            ),
            *bulk(tokens),
        )

    async def remote_send(
        self,
        request_id: str,
        begin: int,
        end: int,
        grant: Grant,
        tokens: list[int] | None,
        *,
        lane: int = 0,
        sampling: SamplingParams | None = None,
        salt: str = "",
        adapter: str = "",
    ) -> wire.Sent:
        async with asyncio.timeout(ANSWER_S):
            sent, _ = await self.begin_send(
                request_id,
                begin,
                end,
                grant,
                tokens,
                lane=lane,
                sampling=sampling,
                salt=salt,
                adapter=adapter,
            )
        assert isinstance(sent, wire.Sent), sent
        assert sent.request_id == request_id
        return sent

    async def start_generate(
        self,
        request_id: str,
        begin: int,
        sampling: SamplingParams,
        tokens: list[int] | None,
        *,
        grant: Grant | None = None,
        await_first: bool = False,
        num_output_tokens: int = 0,
        salt: str = "",
        ttl_s: float = TTL_S,
        numerics: str = "",
        adapter: str = "",
    ) -> Stream:
        """Accepted: its tokens come into the stream."""
        grant_id = None if grant is None else grant.grant_id
        build = lambda call: wire.StartGenerate(  # noqa: E731
            *(
                call,
                request_id,
                begin,
                sampling,
                ttl_s,
                grant_id,
                await_first,
                num_output_tokens,
                salt,
                numerics,
                adapter,
            )
        )
        await self.ask(wire.Accepted, build, *bulk(tokens))
        return self.streams.setdefault(request_id, Stream())

    async def commit(self, request_id: str, grant: Grant, *, numerics: str = "", ttl_s: float = TTL_S) -> int:
        """Tokens that are prefix cache now."""
        committed, _ = await self.ask(
            wire.Committed, lambda call: wire.Commit(call, request_id, grant.grant_id, ttl_s, numerics)
        )
        return committed.num_tokens

    async def abort(self, request_id: str) -> None:
        await self.ask(wire.Done, lambda call: wire.Abort(call, request_id))

    async def release(self, request_id: str, grant: Grant) -> None:
        await self.ask(wire.Done, lambda call: wire.Release(call, request_id, grant.grant_id))

    async def stats(self) -> wire.EngineStats:
        return (await self.ask(wire.EngineStats, wire.Stats))[0]

    async def snapshot(self) -> tuple[wire.SnapshotReply, bytes]:
        reply, frames = await self.ask(wire.SnapshotReply, wire.Snapshot)
        assert len(frames) == 1
        return reply, frames[0]

    # --- what comes ---------------------------------------------------------------------------------

    async def until(self, is_so: Callable[[], bool], timeout_s: float = ANSWER_S) -> None:
        """Look again with everything that comes."""
        async with asyncio.timeout(timeout_s):
            while not is_so():
                self._raise_broken()
                self._news.clear()
                await self._news.wait()
        self._raise_broken()

    def stir(self) -> None:
        """Something else has come that ``until`` may wait for."""
        self._news.set()

    async def finished(self, request_id: str, timeout_s: float = ANSWER_S) -> Stream:
        """The whole stream of a request."""
        stream = self.streams.setdefault(request_id, Stream())
        await self.until(lambda: stream.finished is not None, timeout_s)
        return stream

    def _raise_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    async def _ping(self) -> None:
        # Not taken: the bus is closed.
        while self._socket.send(ENGINE_REQUEST.encode(wire.Ping(self.incarnation))):
            await asyncio.sleep(PING_S)

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message, bulk = ENGINE_REPLY.decode(frames)
            self._take(message, bulk)
        except Exception as error:
            self._broken = error
        self._news.set()

    def _take(self, message: wire.EngineReply, bulk: list[bytes]) -> None:
        match message:
            case wire.Deltas():
                for delta in message.deltas:
                    self.streams.setdefault(delta.request_id, Stream()).take(delta)
                if self.gives_credit:
                    self.send(wire.Credit(1))
            case wire.Heartbeat():
                self.heartbeats.append(message)
            case wire.Failed(call_id=0):
                self.told.append(message)
            case _:
                future = self._waiting.pop(message.call_id, None)
                assert future is not None, f"a second answer, or one to nobody: {message}"
                if future.done():
                    return  # its waiter has gone
                if isinstance(message, wire.Failed):
                    future.set_exception(RefusedError(message))
                    future.exception()
                else:
                    future.set_result((message, bulk))


def bulk(tokens: list[int] | None) -> list[bytes]:
    return [] if tokens is None else [encode_tokens(tokens)]
