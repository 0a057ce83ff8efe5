"""What a strategy holds of a transfer: the receiver's grant and the sends that fill it.

The rule that both keep: sends of one grant do not overlap, and before anyone builds on the grant they cover
``[matched, end)`` without a gap. So no strategy can decode on KV that nobody writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from functools import reduce

from microserve.protocol.errors import InvalidInterval, MeshError, StrategyError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import MAX_LANES, Grant
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.services.links.engine import Answer
from microserve.services.router.engines.connection import Connection
from microserve.services.router.request.decision import Send
from microserve.services.router.request.request import Request
from microserve.services.router.request.scope import RequestScope


class GrantHandle:
    """The receiver holds ``[0, matched)`` and has made room for ``[matched, end)``.

    An empty interval (``end == 0``) needs no grant: ``grant`` is None and nothing is to be sent.
    """

    def __init__(
        self, engine_id: str, grant: Grant | None, *, has_first: bool = True, may_lose: bool = False
    ) -> None:
        """``has_first``: the receiver awaits a first token that its sender samples."""
        self.engine_id = engine_id
        """The receiver's."""
        self.has_first = has_first
        self.may_lose = may_lose
        """Its KV may come by a codec that loses some of it."""
        self.grant = grant
        self.sendings: list[Sending] = []
        self.is_used = grant is None
        """Generated from, committed or released."""
        self._num_lanes = 0

    @property
    def grant_id(self) -> str:
        """Empty where nothing is to be received."""
        return self.grant.grant_id if self.grant else ""

    @property
    def matched(self) -> int:
        """Prompt tokens that the receiver has in its cache already."""
        return self.grant.matched if self.grant else 0

    @property
    def end(self) -> int:
        """Where what was asked for ends."""
        return self.grant.end if self.grant else 0

    @property
    def numerics(self) -> Numerics | None:
        """In which class the KV is that its sends bring; None without any."""
        classes = [sending.numerics for sending in self.sendings]
        return reduce(Numerics.joined, classes) if classes else None

    @property
    def is_complete(self) -> bool:
        """The receiver has the whole interval in its cache: nothing is to be sent."""
        return self.matched >= self.end

    def take_lane(self) -> int:
        """Each writer lane is handed out once. Raises :class:`StrategyError` when none is left."""
        if self._num_lanes == MAX_LANES:
            raise StrategyError(f"a grant takes at most {MAX_LANES} sends")
        self._num_lanes += 1
        return self._num_lanes - 1

    def check_open(self, engine_id: str) -> None:
        """Raises :class:`StrategyError` when it is of another engine or was used."""
        if self.engine_id != engine_id:
            raise StrategyError(f"the grant is one of engine {self.engine_id}, not of {engine_id}")
        if self.is_used and self.grant is not None:
            raise StrategyError(f"grant {self.grant_id} was used already")

    def interval(self, request: Request, begin: int | None, end: int | None) -> tuple[int, int]:
        """What is left to send of ``[begin, end)``: nothing below the receiver's match.

        Raises :class:`InvalidInterval` when it is not inside the grant, ``StrategyError`` when that was used.
        """
        self.check_open(self.engine_id)
        start = 0 if begin is None else request.bound("begin", begin)
        stop = request.bound("end", end)
        if not start <= stop <= self.end:
            raise InvalidInterval(f"[{start}, {stop}) is not inside the grant's [0, {self.end})", field="end")
        return max(start, self.matched), stop

    def sampler(self, *, is_needed: bool = True) -> Sending | None:
        """The send that reaches the grant's end and samples there; call after :meth:`check_covered`.

        Raises :class:`StrategyError` when it does not sample, or None where that is not needed.
        """
        last = max(self.sendings, key=lambda sending: sending.end)
        if not last.first_token:
            if not is_needed:
                return None
            raise StrategyError("begin is the prompt's end, but no sender samples the first token")
        return last

    def check_splits(self, engine_id: str, begin: int, end: int, split_tokens: int) -> None:
        """A send of that engine can begin and end there. Raises :class:`InvalidInterval`: a bound that was
        moved would have tokens sent twice, or by nobody."""
        for name, bound, is_edge in (("begin", begin, begin <= self.matched), ("end", end, end == self.end)):
            if bound % split_tokens and not is_edge:
                raise InvalidInterval(
                    f"{name} is {bound}: engine {engine_id} splits at multiples of {split_tokens} tokens "
                    "(Engine.split_at)",
                    field=name,
                )

    def check_free(self, begin: int, end: int) -> None:
        """Raises :class:`InvalidInterval` when another send writes into ``[begin, end)``."""
        for sending in self.sendings:
            if begin < sending.end and sending.begin < end:
                raise InvalidInterval(
                    f"[{begin}, {end}) overlaps the send of [{sending.begin}, {sending.end})", field="begin"
                )

    def check_covered(self) -> None:
        """Raises :class:`InvalidInterval` when part of ``[matched, end)`` is sent by nobody."""
        position = self.matched
        for sending in sorted(self.sendings, key=lambda s: s.begin):
            if sending.begin > position:
                break
            position = sending.end
        if position < self.end:
            raise InvalidInterval(
                f"no send covers [{position}, ...) of the grant's [{self.matched}, {self.end})", field="begin"
            )


class Sending:
    """KV of ``[begin, end)`` on its way into a grant. ``await`` it for the sender's ``Sent``, or do not:
    whoever builds on the grant waits for what it needs."""

    def __init__(
        self,
        request_id: str,
        grant: GrantHandle,
        begin: int,
        end: int,
        *,
        first_token: bool,
        numerics: Numerics = UNKNOWN,
        may_lose: bool = False,
    ) -> None:
        """``numerics``: of the sender. ``may_lose``: it may go by a codec that loses something."""
        self.numerics = numerics
        self._may_lose = may_lose
        self.grant = grant
        self.begin = begin
        self.end = end
        self.first_token = first_token
        """The sender samples output token 0 as well."""
        self.error: MeshError | None = None
        self.sent: wire.Sent | None = None
        if begin >= end:
            self.sent = wire.Sent(0, request_id, 0, 0, 0, 0, wire.Timings())
        self._settled = asyncio.Event()
        self._listeners: list[Callable[[Sending], None]] = []

    @property
    def name(self) -> str:
        """Key of this send in the request's books."""
        return f"send {self.grant.grant_id} {self.begin}"

    @property
    def may_have_lost(self) -> bool:
        """Something of it is lost, or may be for all that is known by now."""
        if not self._may_lose or self.begin >= self.end:
            return False
        return self.sent is None or (self.sent.coding is not None and self.sent.coding.is_lossy)

    @property
    def is_settled(self) -> bool:
        """Done, or failed."""
        return self.sent is not None or self.error is not None

    def start(
        self, scope: RequestScope, connection: Connection, build: Callable[[int], wire.RemoteSend]
    ) -> None:
        """Send the action now; the answer settles this object. Raises when the engine is lost."""
        name, begun = self.name, scope.now
        bulk = scope.prompt(connection)
        scope.hold(connection, name)
        call_id, future = connection.begin(build, *bulk)
        scope.engage()
        scope.account.begin_transfer(name, connection.engine_id, self.grant.engine_id, self.end - self.begin)
        scope.on_close(lambda error: connection.fail(call_id, error))

        def settle(answer: asyncio.Future[Answer]) -> None:
            scope.disengage()
            scope.account.release_prefill(connection.engine_id, name)
            try:
                sent = connection.expect(answer.result()[0], wire.Sent)
            except MeshError as error:
                self.error = error
                scope.account.end_transfer(name)
                scope.gone(connection, name)
            else:
                self.sent = sent
                scope.account.end_transfer(name, sent)
                scope.clock.sent(begun, scope.now, sent.timings)
                scope.sent_through(sent.heap)
                if sent.coding is not None:
                    send = Send(connection.engine_id, self.grant.engine_id, self.begin, self.end)
                    scope.decision.codings[send] = sent.coding
                scope.drop(connection, name)
            self._settled.set()
            for listener in self._listeners:
                listener(self)
            self._listeners.clear()

        future.add_done_callback(settle)

    def listen(self, listener: Callable[[Sending], None]) -> None:
        """Call ``listener`` when this is settled; now, if it is."""
        if self.is_settled:
            listener(self)
        else:
            self._listeners.append(listener)

    async def wait(self) -> wire.Sent:
        """Until every byte is put. Raises the sender's error."""
        if not self.is_settled:
            await self._settled.wait()
        if self.sent is None:
            assert self.error is not None, "settled means sent or failed"
            raise self.error
        return self.sent

    def __await__(self) -> Generator[object, None, wire.Sent]:
        return self.wait().__await__()
