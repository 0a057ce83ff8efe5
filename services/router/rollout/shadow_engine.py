"""An engine for decisions that nobody carries out: answers every action at once, as if all went well.

A ``Connection`` like that to a real engine, so that a shadow's actions go through the very handles of
engine.py and meet every check there. Sends nothing, holds nothing, computes nothing.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Protocol, TypeVar, assert_never

from microserve.protocol.errors import MeshError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.adapter import adapter_named
from microserve.protocol.messages.engine import Delta, EngineInfo, EngineLoad, Finished, Timings, Usage
from microserve.protocol.messages.kv.grant import Grant, HeapAddress
from microserve.services.links.engine import Answer
from microserve.services.links.stream import TokenStreams
from microserve.services.router.engines.connection import Action

T = TypeVar("T")

_NOWHERE = HeapAddress("shadow", "", 0, 0, 0, 0)


class Facts(Protocol):
    """What is known of an engine, as a ``Connection`` has it."""

    @property
    def engine_id(self) -> str: ...
    @property
    def info(self) -> EngineInfo: ...
    @property
    def labels(self) -> Sequence[str]: ...
    @property
    def barred(self) -> Collection[str]: ...
    @property
    def load(self) -> EngineLoad: ...
    @property
    def load_at(self) -> float: ...


class ShadowConnection:
    """For one request; what handles, scope and streams use of a connection, and no more."""

    def __init__(self, real: Facts, num_cached: Callable[[], int]) -> None:
        """``num_cached``: prompt tokens that the engine is known to hold."""
        self.engine_id = real.engine_id
        self.prompts: set[str] = set()
        self.streams = TokenStreams()
        self._real = real
        self._num_cached = num_cached
        self._ids = itertools.count(1)
        self._loop = asyncio.get_running_loop()

    @property
    def info(self) -> EngineInfo:
        return self._real.info

    @property
    def labels(self) -> Sequence[str]:
        return self._real.labels

    @property
    def barred(self) -> Collection[str]:
        return self._real.barred

    @property
    def load(self) -> EngineLoad:
        return self._real.load

    @property
    def load_at(self) -> float:
        return self._real.load_at

    def begin(self, build: Callable[[int], Action], *_bulk: bytes) -> tuple[int, asyncio.Future[Answer]]:
        call_id = next(self._ids)
        future: asyncio.Future[Answer] = self._loop.create_future()
        future.set_result((self._answer(call_id, build(call_id)), []))
        return call_id, future

    async def wait(self, _call_id: int, future: asyncio.Future[Answer], _timeout_s: float) -> Answer:
        return future.result()

    async def call(
        self, build: Callable[[int], Action], expected: type[T], *bulk: bytes, timeout_s: float
    ) -> T:
        return self.expect(self.begin(build, *bulk)[1].result()[0], expected)

    def expect(self, reply: wire.EngineReply, expected: type[T]) -> T:
        assert isinstance(reply, expected), "every action has its answer below"
        return reply

    def fail(self, _call_id: int, _error: MeshError) -> None:
        """All calls are answered."""

    def abort(self, _request_id: str) -> None:
        """Nothing is held."""

    def _answer(self, call_id: int, message: Action) -> wire.EngineReply:
        match message:
            case wire.PrepRecv():
                return wire.Granted(call_id, self._grant(call_id, message))
            case wire.RemoteSend():
                first = None if message.sampling is None else 0
                num_sent = message.end - message.begin
                return wire.Sent(call_id, message.request_id, 0, 0, num_sent, 0, Timings(), first)
            case wire.StartGenerate():
                self._loop.call_soon(self._generate, message)
                return wire.Accepted(call_id)
            case wire.Commit():
                return wire.Committed(call_id, 0)
            case wire.Release():
                return wire.Done(call_id)
        assert_never(message)

    def _grant(self, call_id: int, message: wire.PrepRecv) -> Grant:
        end, block_size = message.end, self.info.block_size
        matched = min(self._num_cached(), end) // block_size * block_size
        return Grant(
            grant_id=f"shadow/{self.engine_id}/{call_id}",
            engine_id=self.engine_id,
            incarnation=self.info.incarnation,
            slot=0,
            generation=1,
            matched=matched,
            end=end,
            blocks=[],
            block_size=block_size,
            layout_hash=self.info.layout_hash,
            heap=_NOWHERE,
            lease_s=1.0,
            numerics=self.info.numerics.name,
            geometry=self.info.geometry,
            adapter=adapter_named(message.adapter, self.info.adapters),
        )

    def _generate(self, message: wire.StartGenerate) -> None:
        """All of the answer: one token."""
        offset = message.num_output_tokens + (1 if message.await_first else 0)
        end = Finished("length", Usage(), Timings())
        self.streams.push([Delta(message.request_id, offset, [0], finished=end)])
