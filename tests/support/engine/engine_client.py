"""A router without strategies: speaks the actions to one engine, for tests and measurements."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, TypeVar

from microserve.protocol.bus.calls import Calls
from microserve.protocol.bus.codec import ENGINE_REPLY, ENGINE_REQUEST, encode_tokens
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import error_for
from microserve.protocol.messages import engine as wire

T = TypeVar("T")


class EngineClient:
    """One connection to one engine; every call is awaited with a timeout."""

    def __init__(self, bus: Bus, address: str, *, credit: int = 1000) -> None:
        self._bus = bus
        self._incarnation = secrets.randbits(62) | 1
        self._router_id = f"test-{secrets.token_hex(4)}"
        self._credit = credit
        self._calls: Calls[tuple[wire.EngineReply, list[bytes]]] = Calls(address)
        self.deltas: dict[str, list[wire.Delta]] = {}
        self._grown = asyncio.Event()
        self.info: wire.EngineInfo | None = None
        self.heartbeat: wire.Heartbeat | None = None
        self._socket = bus.client(address, self._receive)
        self._pinging: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EngineClient:
        welcome = await self.call(wire.Welcome, wire.Hello, self._router_id, self._incarnation, self._credit)
        self.info = welcome.info
        self._pinging = asyncio.create_task(self._ping())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pinging is not None:
            self._pinging.cancel()
        self._socket.close()

    async def _ping(self) -> None:
        while True:
            self._socket.send(ENGINE_REQUEST.encode(wire.Ping(self._incarnation)))
            await asyncio.sleep(0.3)

    def _receive(self, frames: list[bytes]) -> None:
        message, bulk = ENGINE_REPLY.decode(frames)
        match message:
            case wire.Deltas():
                self._socket.send(ENGINE_REQUEST.encode(wire.Credit(1)))
                for delta in message.deltas:
                    self.deltas.setdefault(delta.request_id, []).append(delta)
                self._grown.set()
            case wire.Heartbeat():
                self.heartbeat = message
            case wire.Failed():
                error = error_for(message.code, message.detail, field=message.field)
                self._calls.fail(message.call_id, error)
            case _:
                self._calls.resolve(message.call_id, (message, bulk))

    async def call(
        self, answer: type[T], kind: Any, *args: Any, tokens: list[int] | None = None, **kwargs: Any
    ) -> T:
        """Send ``kind(call_id, *args)`` and wait for its answer, which must be an ``answer``."""
        call_id = self._calls.next_id()
        future = self._calls.open(call_id)
        bulk = [encode_tokens(tokens)] if tokens is not None else []
        self._socket.send(ENGINE_REQUEST.encode(kind(call_id, *args, **kwargs), *bulk))
        reply, _ = await self._calls.wait(call_id, future, 60.0)
        assert isinstance(reply, answer), reply
        return reply

    async def stats(self) -> wire.EngineStats:
        return await self.call(wire.EngineStats, wire.Stats)

    async def finished(self, request_id: str, timeout_s: float = 60.0) -> tuple[list[int], wire.Finished]:
        """All tokens of a stream (offsets checked) and how it ended."""
        async with asyncio.timeout(timeout_s):
            while True:
                deltas = self.deltas.get(request_id, [])
                if deltas and deltas[-1].finished is not None:
                    tokens: list[int] = []
                    first = deltas[0].offset
                    for delta in deltas:
                        assert delta.offset == first + len(tokens), "gap or duplicate"
                        tokens.extend(delta.token_ids)
                    return tokens, deltas[-1].finished
                self._grown.clear()
                await self._grown.wait()
