"""Everything that one request holds in the mesh, with one owner: the task that serves it.

Handles that a strategy gets (engine.py, grant.py) write down here what they take; ``close`` gives all of
it back at once and without waiting, whatever the strategy did. Knows no intervals and no strategies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from microserve.protocol.errors import DeadlineExceeded, MeshError, StrategyError
from microserve.protocol.messages.engine import Finished
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.services.links.stream import Tokens
from microserve.services.router.engines.connection import Connection
from microserve.services.router.engines.load import Account
from microserve.services.router.request.cap import AnswerWhole
from microserve.services.router.request.decision import Decision
from microserve.services.router.request.phase import PhaseClock
from microserve.services.router.request.request import Request
from microserve.services.router.request.trail import Trail


class RequestScope:
    """What a request holds on which engine, and how long it may."""

    def __init__(
        self, request: Request, account: Account, clock: PhaseClock, *, call_timeout_s: float
    ) -> None:
        self.request = request
        self.sampling = request.sampling
        """As its strategy has capped it."""
        self.account = account
        self.clock = clock
        self.engines: list[str] = []
        """Engines that took part, in order of first use."""
        self.heaps: list[str] = []
        """Kinds of heap that KV was sent through, likewise."""
        self.unused: dict[str, str] = {}
        """Grants taken and neither generated from, committed nor released: engine id by grant id."""
        self.decision = Decision()
        """What its strategy decided, for shadows to be compared with."""
        self.traceparent = ""
        """Under which its actions stand in a trace; empty: in none."""
        self.trail: Trail | None = None
        """What it saw and chose; None: that is not recorded."""
        self.numerics: Numerics = UNKNOWN
        """Of all KV that its tokens are made from; since it generates."""
        self.is_generating = False
        self.is_check = False
        """It asks whether two engines agree, also two that exchange no KV because they did not."""
        self._given: list[int] = []
        """Output that engines have given in this attempt."""
        self._finished: Finished | None = None
        self.leave: Callable[[str], bool] | None = None
        """Makes what it generates go on on the engine of that id; since it generates."""
        self.is_closed = False
        self._call_timeout_s = call_timeout_s
        self._loop = asyncio.get_running_loop()
        self._holds: dict[Connection, set[str]] = {}
        self._prompts: set[Connection] = set()
        self._aborted: set[Connection] = set()
        """Engines that have been told to drop it, and asked for nothing since."""
        self._num_engaged = 0
        self._idle_since = self._loop.time()
        self._on_close: list[Callable[[MeshError], None]] = []

    @property
    def now(self) -> float:
        return self._loop.time()

    @property
    def remaining_s(self) -> float:
        """Seconds that are left. Raises :class:`DeadlineExceeded` when there are none."""
        remaining = self.request.deadline - self._loop.time()
        if remaining <= 0:
            raise DeadlineExceeded("the request's time is used up")
        return remaining

    @property
    def call_timeout_s(self) -> float:
        """Longest wait for an answer that an engine gives at once."""
        return min(self._call_timeout_s, self.remaining_s)

    @property
    def idle_s(self) -> float:
        """Seconds since the strategy last waited for an engine; 0 while it does."""
        return 0.0 if self._num_engaged else self._loop.time() - self._idle_since

    def engage(self) -> None:
        """An engine does something that the strategy waits for, or will: until :meth:`disengage`."""
        self._num_engaged += 1

    def disengage(self) -> None:
        self._num_engaged -= 1
        self._idle_since = self._loop.time()

    @contextmanager
    def engaged(self) -> Iterator[None]:
        self.engage()
        try:
            yield
        finally:
            self.disengage()

    def check(self, request: Request) -> None:
        """A handle is used for its own, living request. Raises :class:`StrategyError`."""
        if request is not self.request:
            raise StrategyError(
                f"this mesh serves request {self.request.request_id}, not {request.request_id}"
            )
        if self.is_closed:
            raise StrategyError(f"request {request.request_id} has ended")

    def check_unfinished(self) -> None:
        """There are tokens left to come. Raises :class:`AnswerWhole`."""
        num_output_tokens = self.request.num_output_tokens
        if num_output_tokens and num_output_tokens >= self.sampling.max_tokens:
            raise AnswerWhole(f"{self.sampling.max_tokens} tokens have been delivered")

    def sent_through(self, heap: str) -> None:
        """KV was put through a heap of this kind; empty: it is not known, or nothing was."""
        if heap and heap not in self.heaps:
            self.heaps.append(heap)

    # --- what engines give ---------------------------------------------------------------------------

    def give(self, chunk: Tokens) -> None:
        """An engine has given the strategy this to yield."""
        self._given[chunk.offset - self.request.num_output_tokens :] = chunk.token_ids
        self._finished = chunk.finished

    def has_given(self, chunk: Tokens) -> bool:
        """These tokens, and this end, are an engine's, however they were cut into chunks."""
        begin = chunk.offset - self.request.num_output_tokens
        end = begin + len(chunk.token_ids)
        if self._given[begin:end] != chunk.token_ids:
            return False
        return chunk.finished is None or (chunk.finished is self._finished and end == len(self._given))

    # --- what engines hold -------------------------------------------------------------------------

    def prompt(self, connection: Connection) -> tuple[bytes, ...]:
        """Bulk frames of the next action there: the prompt travels once to each engine."""
        if connection in self._prompts:
            return ()
        self._prompts.add(connection)
        return (self.request.token_frame,)

    def hold(self, connection: Connection, name: str) -> None:
        """From now on, or from when a message on its way arrives, the engine holds ``name`` for us."""
        if connection not in self._holds:
            self._holds[connection] = set()
            connection.prompts.add(self.request.request_id)
            self.clock.routed(self.now)
        if connection.engine_id not in self.engines:
            self.engines.append(connection.engine_id)
        self._holds[connection].add(name)
        self._aborted.discard(connection)

    def drop(self, connection: Connection, *names: str) -> None:
        """The engine says that it holds these no longer; it still has the prompt."""
        self._holds.get(connection, set()).difference_update(names)

    def gone(self, connection: Connection, *names: str) -> None:
        """As :meth:`drop`, and with the last of them the engine has dropped the prompt too."""
        self.drop(connection, *names)
        if not self._holds.get(connection):
            self._prompts.discard(connection)

    def holders_of(self, name: str) -> list[Connection]:
        """Engines that hold it for us."""
        return [connection for connection, names in self._holds.items() if name in names]

    def use(self, grant_id: str) -> None:
        """The strategy has done with a grant what grants are for."""
        self.unused.pop(grant_id, None)

    def abort(self, connection: Connection) -> None:
        """Make one engine drop everything of this request; said once, however often, until it holds anew."""
        if connection not in self._aborted:
            self._aborted.add(connection)
            connection.abort(self.request.request_id)
        for grant_id in [g for g, engine_id in self.unused.items() if engine_id == connection.engine_id]:
            del self.unused[grant_id]
        self._holds.get(connection, set()).clear()
        self._prompts.discard(connection)

    def abort_engines(self, engine_ids: Collection[str]) -> None:
        """As :meth:`abort`, those of them that hold something."""
        for connection in [each for each in self._holds if each.engine_id in engine_ids]:
            self.abort(connection)

    # --- the end -----------------------------------------------------------------------------------

    def on_close(self, callback: Callable[[MeshError], None]) -> None:
        """At the end, call ``callback`` with the error that a wait which still stands shall raise."""
        self._on_close.append(callback)

    def close(self) -> None:
        """End every engine's part that may still be there and every wait of ours. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        for connection, holds in self._holds.items():
            if holds:
                connection.abort(self.request.request_id)
            connection.prompts.discard(self.request.request_id)
        self._holds.clear()
        ended = StrategyError(f"request {self.request.request_id} has ended")
        for callback in self._on_close:
            callback(ended)
        self._on_close.clear()
        self.leave = None  # refers to a generation, which refers to this: left to the collector else
        self.account.close()


def out_of_time() -> DeadlineExceeded:
    return DeadlineExceeded("the request's time was used up")
