"""The running ``StartGenerate`` of a request: an async iterator of chunks, which a strategy yields as a whole
or one by one.

Owns the stream from the decode engine and ties it to the sends that it builds on. Knows no intervals.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from microserve.protocol.errors import MeshError, PeerError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.numerics import MIXED, Numerics
from microserve.services.links.stream import Tokens, TokenStream
from microserve.services.router.authoring.action.grant import Sending
from microserve.services.router.engines.connection import Connection, EngineLeaving
from microserve.services.router.request.scope import RequestScope

STREAM = "stream"
"""What the engine holds for a generation, in the scope's book."""


class Generating:
    """Chunks of output tokens, the last one with ``finished``. For one reader, once. Yielded itself, all that
    is still to come goes to the client without waking the strategy."""

    def __init__(
        self,
        scope: RequestScope,
        connection: Connection,
        build: Callable[[int], wire.StartGenerate],
        *,
        grant_id: str = "",
        first_from: Sending | None = None,
    ) -> None:
        """Sends the action now. Raises the reason when the engine is lost.

        ``first_from``: the send whose sender samples token 0; else this engine samples it.
        """
        self._scope = scope
        self._connection = connection
        self._grant_id = grant_id
        self._first_from = first_from
        self._stream = TokenStream(
            scope.request.request_id,
            connection.engine_id,
            await_first=first_from is not None,
            start=scope.request.num_output_tokens,
        )
        self._ended = False
        self._num_chunks = 0
        """With output in them."""
        self._sendings: list[Sending] = []
        """That bring KV which it is made from."""
        bulk = scope.prompt(connection)
        scope.hold(connection, STREAM)
        connection.streams.add(self._stream)
        try:
            self._call_id, self._accepted = connection.begin(build, *bulk)
        except MeshError:
            connection.streams.remove(self._stream)
            raise
        self._stream.accepted = self._accepted
        self._is_accepted = False
        scope.is_generating, scope.leave = True, self.leave
        scope.on_close(self._give_up)

    def depends_on(self, sending: Sending) -> None:
        """A failed send ends the stream, unless the engine's own tokens prove that all of it came in."""
        self._sendings.append(sending)
        sending.listen(self._take_sending)

    def __aiter__(self) -> Generating:
        return self

    async def __anext__(self) -> Tokens:
        """Raises the error of the engine or of a send that this depends on."""
        if self._ended:
            raise StopAsyncIteration
        self._scope.engage()
        try:
            if not self._is_accepted:
                await self._accept()
            chunk = await self._stream.next()
        except MeshError:
            self._end()
            if self._was_refused():
                self._scope.gone(self._connection, STREAM)
                self._scope.is_generating = False
            raise
        finally:
            self._scope.disengage()
        is_output = bool(chunk.token_ids) or chunk.finished is not None
        if self._num_chunks == 0 and is_output:
            self._scope.clock.first_token(self._scope.now)
            self._scope.account.release_prefill(self._connection.engine_id, STREAM)
            if any(sending.may_have_lost for sending in self._sendings):
                self._scope.numerics = Numerics(MIXED)  # whose bits are nobody's promise (WIRE.md 4.8)
        self._num_chunks += is_output
        self._scope.give(chunk)
        if chunk.finished is not None:
            self._end()
            self._scope.gone(self._connection, STREAM, self._grant_id)
        return chunk

    def is_of(self, scope: RequestScope) -> bool:
        """Does it generate for the request of ``scope``?"""
        return self._scope is scope

    @property
    def engine_id(self) -> str:
        """Where it runs."""
        return self._connection.engine_id

    @property
    def offset(self) -> int:
        """Of the next output token that it brings."""
        return self._stream.offset

    @property
    def is_answered(self) -> bool:
        """The engine has said whether it will."""
        return self._accepted.done()

    @property
    def is_ready(self) -> bool | None:
        """It has output that nobody has read; False: it has failed; None: neither."""
        if self._was_refused():
            return False
        return self._stream.is_ready if self._accepted.done() else None

    def watch(self, callback: Callable[[], None]) -> None:
        """``callback`` when :attr:`is_ready` may have changed; it must not raise."""
        self._stream.on_news = callback
        self._accepted.add_done_callback(lambda _: callback())

    def leave(self, wanted: str) -> bool:
        """Go on on the engine ``wanted``, behind what is in. False: nothing is in yet, or it has ended."""
        if self._ended or not self._num_chunks:
            return False
        self._stream.fail(EngineLeaving(self._connection, wanted))
        return True

    def give_up(self, error: MeshError) -> None:
        """Nobody reads it any more; the engine has still to be told. A reader that is left gets ``error``."""
        if not self._ended:
            self._end()
        self._give_up(error)

    async def pass_on(self, tell: Callable[[Tokens], None]) -> Tokens:
        """Hand each chunk to ``tell``, which must not raise, the moment that it comes; returns the last one.

        Raises as :meth:`__anext__`."""
        chunk = await self.__anext__()
        while chunk.finished is None:
            tell(chunk)
            if self._num_chunks:  # the first token is looked at here
                self._stream.tell(tell)
            chunk = await self.__anext__()
        return chunk

    def _was_refused(self) -> bool:
        """The engine is lost or said no: nothing can come from there, so the strategy may start elsewhere.

        After a timeout (which cancels the future) it may yet come.
        """
        return (
            self._accepted.done()
            and not self._accepted.cancelled()
            and self._accepted.exception() is not None
        )

    async def _accept(self) -> None:
        answer, _ = await self._connection.wait(self._call_id, self._accepted, self._scope.call_timeout_s)
        self._connection.expect(answer, wire.Accepted)
        self._is_accepted = True
        self._scope.clock.accepted(self._scope.now)

    def _take_sending(self, sending: Sending) -> None:
        if sending.error is not None:
            # The first token comes by its sender's answer alone, however far the engine has got by itself.
            if sending is self._first_from or not self._stream.started:
                self._stream.fail(sending.error)
        elif sending is self._first_from and sending.sent is not None:
            if sending.sent.first_token is None:
                self._stream.fail(PeerError("the sender was asked for the first token and sent none"))
            else:
                self._stream.push_first(sending.sent.first_token, sending.sent.first_logprob)

    def _end(self) -> None:
        self._ended = True
        self._connection.streams.remove(self._stream)
        self._scope.account.release_prefill(self._connection.engine_id, STREAM)
        self._scope.account.release_sequence(self._connection.engine_id)

    def _give_up(self, error: MeshError) -> None:
        """The request has ended; a reader that is left gets ``error``."""
        self._connection.streams.remove(self._stream)
        self._connection.fail(self._call_id, error)
        self._stream.fail(error)


Chunks = AsyncGenerator[Tokens | Generating, None]
"""What a strategy is, once it runs: chunks one by one, or a generation with all that is still to come."""
