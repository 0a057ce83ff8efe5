"""One engine as a strategy sees it: the actions, checked, accounted for and tied to the request.

A strategy cannot leak through this handle: whatever it takes is in the request's scope before the message
leaves. Misuse raises ``StrategyError`` or ``InvalidInterval`` at the author's line, before anything is sent.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial

from microserve.protocol.errors import (
    CacheFull,
    DeadlineExceeded,
    InvalidInterval,
    MeshError,
    PeerError,
    StrategyError,
    TransferFailed,
    UnsupportedAction,
)
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.adapter import adapter_named
from microserve.protocol.messages.engine_info import (
    COMMIT,
    FIRST_TOKEN,
    GRAMMAR,
    PREP_RECV,
    PROMPT_LOGPROBS,
    REMOTE_SEND,
)
from microserve.protocol.messages.kv.coding import MAX_CODEC_CHARS
from microserve.protocol.messages.kv.geometry import difference
from microserve.services.router.authoring.action.generating import STREAM, Generating
from microserve.services.router.authoring.action.grant import GrantHandle, Sending
from microserve.services.router.authoring.view import EngineFacts, OwnLabels
from microserve.services.router.engines.connection import Connection
from microserve.services.router.request.decision import Send
from microserve.services.router.request.request import Request, fits
from microserve.services.router.request.scope import RequestScope

PREP = "prep_recv"
MIN_RETRY_S, MAX_RETRY_S = 0.01, 1.0
"""Pauses between two questions to a full engine; they grow from the engine's own hint."""


class Engine(EngineFacts):
    """Handle of one engine for one request. Equal handles are the same engine."""

    def __init__(
        self,
        connection: Connection,
        own_labels: OwnLabels,
        scope: RequestScope,
        cached: Callable[[str], int],
    ) -> None:
        super().__init__(connection, own_labels)
        self._scope = scope
        self._cached = cached
        """Prompt tokens that the engine of that id is known to hold."""

    async def prep_recv(
        self, request: Request, *, end: int | None = None, lossy: bool | None = None
    ) -> GrantHandle:
        """Make room for KV of ``tokens[:end]``; None is the whole prompt, negative counts from its end.

        ``lossy``: it may come by a codec that loses some of it. True holds where the client says nothing,
        and its key; False always; None leaves it to them, and is exact where they say nothing.

        An engine without room says when to ask again; asking goes on for ``router.call_timeout_s``. Raises
        ``InvalidInterval``, ``CacheFull`` when there is no room for so long, ``UnsupportedAction`` of an
        engine that receives nothing, or a ``PeerError``.
        """
        gives_up_at = self._scope.now + self._scope.call_timeout_s
        pause_s = 0.0
        with self._scope.engaged():
            while True:
                try:
                    return await self._prep_recv(request, end, lossy)
                except CacheFull as error:
                    pause_s = min(pause_s + max(error.retry_after_s, MIN_RETRY_S), MAX_RETRY_S)
                    if self._scope.now + pause_s >= gives_up_at:
                        raise
                    await asyncio.sleep(pause_s)

    async def _prep_recv(self, request: Request, end: int | None, lossy: bool | None) -> GrantHandle:
        """Ask once."""
        scope, connection = self._scope, self._connection
        scope.check(request)
        self._require(PREP_RECV)
        self._require_adapter(request)
        stop, may_lose = request.bound("end", end), request.may_lose(lossy)
        if stop == 0:
            return GrantHandle(self.id, None, has_first=self.can(FIRST_TOKEN), may_lose=may_lose)
        bulk = scope.prompt(connection)
        scope.hold(connection, PREP)
        scope.account.reserve_sequence(self.id)
        ttl_s = scope.remaining_s
        build = partial(
            wire.PrepRecv,
            request_id=request.request_id,
            end=stop,
            ttl_s=ttl_s,
            salt=request.salt,
            adapter=request.adapter,
            traceparent=scope.traceparent,
            may_lose=may_lose,
        )
        try:
            granted = await connection.call(build, wire.Granted, *bulk, timeout_s=scope.call_timeout_s)
        except DeadlineExceeded:
            raise  # the grant may yet be made: PREP stays in the scope and is aborted with it
        except MeshError:
            scope.gone(connection, PREP)
            scope.account.release_sequence(self.id)
            raise
        grant = granted.grant
        scope.hold(connection, grant.grant_id)
        scope.drop(connection, PREP)
        if grant.incarnation != self.info.incarnation or not 0 <= grant.matched <= grant.end == stop:
            raise PeerError(f"engine {self.id} gave a grant that was not asked for")
        if grant.grant_id in scope.unused:
            raise StrategyError("a request has one open grant on an engine")
        scope.unused[grant.grant_id] = self.id
        scope.clock.granted(scope.now)
        return GrantHandle(self.id, grant, has_first=self.can(FIRST_TOKEN), may_lose=may_lose)

    def remote_send(
        self,
        request: Request,
        grant: GrantHandle,
        *,
        begin: int | None = None,
        end: int | None = None,
        first_token: bool | None = None,
        codec: str = "",
        lossy: bool | None = None,
        within_s: float = 0.0,
    ) -> Sending:
        """Compute KV of ``tokens[:end]`` here and put ``[begin, end)`` into ``grant``; starts at once.

        ``begin`` None is where the receiver's match ends, and nothing below that is sent. ``first_token``
        None: sampled here exactly when ``end`` is the prompt's end, and both engines can. Nothing left to
        send: settled at once.

        ``codec``: the KV goes by it: ``auto`` is what pays at this link's rate by what was measured, or a
        profile's name in the sender's library; empty: as it is, as it also goes where the codec may not be
        used. ``lossy`` None: it may lose what the grant may; False: nothing. ``within_s``: the time allowed,
        by which ``auto`` leaves out what keeps missing it; 0: none is said. What became of it is in
        ``Sent.coding`` and in the request's line.

        Raises ``InvalidInterval`` outside the grant, on an overlap, or where this
        engine cannot split (:meth:`split_at`), ``TransferFailed`` where KV of the two differs in shape, or a
        self-check has found that their answers do, ``UnsupportedAction``, ``EngineLost``.
        """
        scope = self._scope
        scope.check(request)
        self._require(REMOTE_SEND)
        self._require_adapter(request)
        start, stop = grant.interval(request, begin, end)
        has_first = grant.has_first and self.can(FIRST_TOKEN)
        samples = stop == request.num_tokens and has_first if first_token is None else first_token
        if samples and not has_first:
            self._require(FIRST_TOKEN)
            raise UnsupportedAction(f"engine {grant.engine_id} awaits no first token of another one")
        if samples and stop != request.num_tokens:
            raise InvalidInterval("the first token can be sampled only at the prompt's end", field="end")
        if samples:
            scope.check_unfinished()
        if len(codec) > MAX_CODEC_CHARS:
            raise StrategyError(f"codec has {len(codec)} characters, at most {MAX_CODEC_CHARS}")
        if not 0.0 <= within_s < math.inf:
            raise StrategyError(f"within_s is {within_s}, not 0 or more")
        if lossy and not grant.may_lose and request.may_lose(lossy):
            raise StrategyError("lossy: the grant may lose nothing (prep_recv(lossy=True))")
        may_lose = bool(codec) and grant.may_lose and lossy is not False
        if grant.grant is None or start >= stop:
            return Sending(request.request_id, grant, start, start, first_token=False)
        grant.check_splits(self.id, start, stop, self.info.split_tokens)
        grant.check_free(start, stop)
        if grant.engine_id in self._connection.barred and not scope.is_check:
            raise barred(self.id, grant.engine_id, suspect=grant.engine_id)
        here, there = f"at {self.id}", f"at {grant.engine_id}"
        if different := difference(self.info.geometry, grant.grant.geometry, ours=here, theirs=there):
            raise TransferFailed(f"KV of these engines differs: {different}")
        ours = adapter_named(request.adapter, self.info.adapters)
        if ours != (theirs := grant.grant.adapter):
            different = f"adapter: {ours or 'none'} {here}, {theirs or 'none'} {there}"
            raise TransferFailed(f"KV of these engines differs: {different}")
        sending = Sending(
            request.request_id,
            grant,
            start,
            stop,
            first_token=samples,
            numerics=self.info.numerics,
            may_lose=may_lose,
        )
        permission, lane, ttl_s = grant.grant, grant.take_lane(), scope.remaining_s
        scope.account.reserve_prefill(self.id, sending.name, max(0, stop - self._cached(self.id)))
        build = partial(
            wire.RemoteSend,
            request_id=request.request_id,
            begin=start,
            end=stop,
            grant=permission,
            lane=lane,
            ttl_s=ttl_s,
            sampling=scope.sampling if samples else None,
            salt=request.salt,
            num_output_tokens=request.num_output_tokens if samples else 0,
            adapter=request.adapter,
            traceparent=scope.traceparent,
            codec=codec,
            may_lose=may_lose,
            within_s=within_s,
        )
        sending.start(scope, self._connection, build)
        grant.sendings.append(sending)
        scope.decision.sends.append(Send(self.id, grant.engine_id, start, stop))
        return sending

    def start_generate(
        self,
        request: Request,
        *,
        begin: int = 0,
        grant: GrantHandle | None = None,
        after: Sending | None = None,
    ) -> Generating:
        """Compute ``tokens[begin:]`` here and generate; starts at once, before the sends are done.

        With a grant (given, or that of ``after``) ``begin`` must be its end and its sends must cover it; the
        engine waits for their KV by itself. With ``begin`` at the prompt's end the sender samples the first
        token, which is passed on as soon as it is known. A request generates once (a refused start may be
        repeated). Raises ``StrategyError``, ``InvalidInterval``, ``EngineLost``.
        """
        scope = self._scope
        scope.check(request)
        if scope.is_generating:
            raise StrategyError("a request generates once")
        scope.check_unfinished()
        self._require_adapter(request)
        if scope.sampling.grammar is not None:
            self._require(GRAMMAR)
        if scope.sampling.prompt_logprobs is not None and not request.num_output_tokens:
            self._require(PROMPT_LOGPROBS)
        if after is not None and grant is not None and after.grant is not grant:
            raise StrategyError("'after' sends into another grant")
        grant = after.grant if grant is None and after is not None else grant
        position = request.bound("begin", begin)
        end = grant.end if grant is not None else 0
        if position != end:
            raise InvalidInterval(f"begin is {position}, but the engine has KV up to {end}", field="begin")
        first_from = None
        if grant is not None:
            grant.check_open(self.id)
            grant.check_covered()
            if position == request.num_tokens and not grant.is_complete:
                # Who computes the last tokens again needs nobody to sample what follows them.
                first_from = grant.sampler(is_needed=not self.info.recompute_tokens)
        grant_id = grant.grant_id if grant is not None else ""
        received = grant.numerics if grant is not None else None
        ttl_s = scope.remaining_s
        build = partial(
            wire.StartGenerate,
            request_id=request.request_id,
            begin=position,
            sampling=scope.sampling,
            ttl_s=ttl_s,
            grant_id=grant_id or None,
            await_first=first_from is not None,
            num_output_tokens=request.num_output_tokens,
            salt=request.salt,
            numerics=received.name if received is not None else "",
            adapter=request.adapter,
            traceparent=scope.traceparent,
        )
        own = self.info.numerics
        scope.numerics = own if received is None else own.joined(received)
        generation = Generating(scope, self._connection, build, grant_id=grant_id, first_from=first_from)
        decision = scope.decision
        decision.engine_id, decision.begin = self.id, position
        decision.awaits_first = first_from is not None
        cached = position if grant_id else self._cached(self.id)
        if scope.sampling.prompt_logprobs is not None and not request.num_output_tokens:
            cached = 0  # the engine needs the logits of all of it
        scope.account.reserve_sequence(self.id)
        scope.account.reserve_prefill(self.id, STREAM, request.num_tokens - cached)
        if grant is not None:
            self._use(grant)
            for sending in grant.sendings:
                generation.depends_on(sending)
        return generation

    async def commit(self, request: Request, grant: GrantHandle) -> int:
        """When all of the grant's KV is in, make it prefix cache here; returns the tokens cached by it.
        An engine of an exact numerics class keeps none of another class.

        Raises the error of a send that failed, ``InvalidInterval`` when the sends leave a gap.
        """
        scope, connection = self._scope, self._connection
        scope.check(request)
        if grant.grant is None:
            return 0
        self._require(COMMIT)
        grant.check_open(self.id)
        grant.check_covered()
        self._use(grant)
        ttl_s, received = scope.remaining_s, grant.numerics
        build = partial(
            wire.Commit,
            request_id=request.request_id,
            grant_id=grant.grant_id,
            ttl_s=ttl_s,
            numerics=received.name if received is not None else "",
        )
        call_id, future = connection.begin(build)

        def fail_with(sending: Sending) -> None:
            if sending.error is not None:
                connection.fail(call_id, sending.error)

        for sending in grant.sendings:
            sending.listen(fail_with)
        with scope.engaged():
            answer, _ = await connection.wait(call_id, future, ttl_s)
        committed = connection.expect(answer, wire.Committed)
        scope.drop(connection, grant.grant_id)
        scope.account.release_sequence(self.id)
        return committed.num_tokens

    async def release(self, request: Request, grant: GrantHandle) -> None:
        """Give a grant back unused."""
        scope, connection = self._scope, self._connection
        scope.check(request)
        if grant.grant is None:
            return
        grant.check_open(self.id)
        self._use(grant)
        build = partial(wire.Release, request_id=request.request_id, grant_id=grant.grant_id)
        with scope.engaged():
            await connection.call(build, wire.Done, timeout_s=scope.call_timeout_s)
        scope.drop(connection, grant.grant_id)
        scope.account.release_sequence(self.id)

    def abort(self, request: Request) -> None:
        """Make this engine drop everything of the request; the engine confirms later."""
        self._scope.check(request)
        self._scope.abort(self._connection)
        self._scope.account.release_sequence(self.id)

    def _require(self, ability: str) -> None:
        """Raises :class:`UnsupportedAction`, before anything is sent."""
        if not self.can(ability):
            kind = f" ({self.info.backend})" if self.info.backend else ""
            raise UnsupportedAction(f"engine {self.id}{kind} does no {ability}")

    def _require_adapter(self, request: Request) -> None:
        if not fits(request, self.info):
            raise UnsupportedAction(f"engine {self.id} does not have adapter {request.adapter!r}")

    def _use(self, grant: GrantHandle) -> None:
        grant.is_used = True
        self._scope.use(grant.grant_id)


def barred(source: str, target: str, *, suspect: str) -> TransferFailed:
    """Of two that exchange no KV; ``suspect``: the next attempt goes by it."""
    error = TransferFailed(f"no KV goes from {source} to {target}: a self-check found that answers differ")
    error.suspect = suspect
    return error
