"""When a request goes on elsewhere, and from where: prompt plus tokens already delivered.

Sampling depends on (seed, position, token) alone, so another engine continues with the same tokens.
:class:`Failover` is sans-I/O: decides; serving.py acts. An attempt is one run of the strategy; a failed one
leaves nothing behind. :func:`move` is the attempt that follows when an engine drains: its KV is sent away and
the stream goes on behind it. Whole blocks of the known tokens stand in the source's prefix cache, so the
source computes (almost) nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass, replace

import structlog

from microserve.protocol import log
from microserve.protocol.errors import (
    CacheFull,
    CapacityError,
    Draining,
    GrantsFull,
    MeshError,
    PeerError,
    PromptTooLong,
    QueueFull,
    StrategyError,
    TransferFailed,
    UnknownRequest,
)
from microserve.protocol.messages.engine import EngineInfo, Finished, Timings, Usage
from microserve.protocol.messages.engine_info import PREP_RECV
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.action.grant import Sending
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.engines.connection import Connection, EngineLeaving
from microserve.services.router.request.cap import AnswerWhole
from microserve.services.router.request.request import Request

_logger = structlog.get_logger()

MAX_ATTEMPTS = 4
"""Runs of the strategy for one request, the first included, while engines fail under it."""
ALONE = "prompt_logprobs"
"""Those are of logits that only who computes all of the prompt has: one engine serves such a request."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.02, 1.0


@dataclass(frozen=True, slots=True)
class Terms:
    """On which the next attempt is made."""

    number: int = 1
    """Of attempts that count; those after an engine that leaves or is full do not."""
    pause_s: float = 0.0
    """Before it."""
    is_plain: bool = False
    """One engine alone shall serve it: what the strategy wanted does not fit, was a mistake, or keeps
    failing."""
    avoid: frozenset[str] = frozenset()
    """Engines not to be used again by this request, unless nobody else is left."""


class Failover:
    """The attempts of one request: ``terms`` of the one that runs, :meth:`decide` when it has failed."""

    def __init__(self, request: Request, *, patience_s: float) -> None:
        """After a failure, engines that are full or absent are waited for ``patience_s`` in all."""
        self.original = request
        self.alone = ALONE if request.sampling.prompt_logprobs is not None else ""
        """Why ``terms`` are plain; empty: they are not."""
        self.terms = Terms(is_plain=bool(self.alone))
        self._full: set[str] = set()
        """Engines that had no room; each is asked once before the request is refused."""
        self._patience_s = patience_s
        self._failed_at: float | None = None

    def decide(self, error: MeshError, engines: Collection[str], now: float) -> Terms | None:
        """Take note of how the attempt failed, in which ``engines`` took part: the terms of the next one,
        which are ``terms`` from now on, or None: the error is the request's end.

        A caller's error and a used-up deadline are final; so is a lack of capacity everywhere that no failure
        of an engine has caused. An engine that leaves has not failed: it counts for nothing, as it takes no
        new work anyway. What cannot be received, for its length or twice for want of a grant, may yet fit
        where it is computed, and a strategy's mistake is not the client's: then one engine serves it plainly.
        """
        if isinstance(error, AnswerWhole):
            return self.terms
        if now >= self.original.deadline:
            return None
        terms = self._next(error, engines, now)
        if terms is not None:
            self.terms = terms
            if terms.is_plain:
                self.alone = self.alone or error.code
        return terms

    def _next(self, error: MeshError, engines: Collection[str], now: float) -> Terms | None:
        last = self.terms
        if isinstance(error, EngineLeaving):
            self._failed_at = now
            return replace(last, pause_s=0.0)
        if isinstance(error, StrategyError) and not last.is_plain:
            return replace(last, is_plain=True, pause_s=0.0)
        if isinstance(error, MoveFailed):
            return replace(last, avoid=last.avoid | _named(error))
        if isinstance(error, PromptTooLong) and error.reporter and not last.is_plain:
            return replace(last, is_plain=True, pause_s=0.0)
        if isinstance(error, CacheFull | QueueFull) and error.reporter and error.reporter not in self._full:
            # Writers that are silent keep grants for as long as they are; one engine alone needs none.
            is_plain = last.is_plain or (isinstance(error, GrantsFull) and bool(self._full))
            self._full.add(error.reporter)
            return replace(last, avoid=last.avoid | {error.reporter}, is_plain=is_plain, pause_s=0.0)
        if isinstance(error, GrantsFull) and not last.is_plain:
            return replace(last, is_plain=True, pause_s=0.0)
        if isinstance(error, PeerError | Draining | UnknownRequest):
            self._failed_at = now if self._failed_at is None else self._failed_at
            if isinstance(error, Draining):
                return replace(last, pause_s=_longer(last.pause_s))
            return self._after_failure(error, engines)
        if isinstance(error, CapacityError) and self._is_patient(now):
            return replace(last, pause_s=_longer(last.pause_s, _asked_s(error)))
        return None

    def _after_failure(self, error: MeshError, engines: Collection[str]) -> Terms | None:
        last = self.terms
        if last.number >= MAX_ATTEMPTS:
            return None
        number = last.number + 1
        return Terms(
            number,
            _longer(last.pause_s, _asked_s(error)),
            # The last attempt sends nothing: engines whose heaps do not reach each other fail every send.
            last.is_plain or (isinstance(error, TransferFailed) and number == MAX_ATTEMPTS),
            # Whoever says that something failed is alive; the other end may be dead and not yet missed.
            last.avoid | (_named(error) or {*engines} - {error.reporter}),
        )

    def _is_patient(self, now: float) -> bool:
        return self._failed_at is not None and now - self._failed_at <= self._patience_s

    def continued(self, delivered: list[int], capped: SamplingParams | None = None) -> Request:
        """The request as another engine must see it: what was delivered is part of its tokens. ``capped``:
        its sampling, if its strategy has capped that."""
        request = self.original.continued(delivered)
        return request if capped is None else replace(request, sampling=capped)

    def end_of(
        self, delivered: list[int], served: EngineInfo | None, capped: SamplingParams | None = None
    ) -> Finished | None:
        """The end that the delivered tokens already are, if only its message was lost."""
        if not delivered:
            return None
        sampling, last = capped or self.original.sampling, delivered[-1]
        usage = Usage(prompt_tokens=self.original.num_tokens, output_tokens=len(delivered))
        eos = served.eos_token_ids if served is not None else []
        if (last in eos and sampling.ends_by_eos()) or last in sampling.stop_token_ids:
            return Finished("stop", usage, Timings(), stop_token_id=last)
        if len(delivered) >= sampling.max_tokens:
            return Finished("length", usage, Timings())
        return None


def _named(error: MeshError) -> set[str]:
    return {error.suspect} if error.suspect else set()


def _asked_s(error: MeshError) -> float:
    """An engine's hint; what the router itself says of when to come again is meant for clients."""
    return error.retry_after_s if error.reporter else 0.0


def _longer(pause_s: float, asked_s: float = 0.0) -> float:
    return min(max(pause_s * 2, FIRST_PAUSE_S, asked_s), MAX_PAUSE_S)


# --- a move away from an engine that drains --------------------------------------------------------

GRANT_S = 2.0
"""Longest wait for room on the target; computing again elsewhere is then the better choice. The source stays
for longer (``MOVE_S`` in the engine's actions.py), or until an abort says that nothing will be asked."""


class MoveFailed(PeerError):
    """The KV could not be moved; nothing was delivered. Not sent."""


async def move(
    mesh: Mesh, request: Request, source: Connection, wanted: str = ""
) -> AsyncGenerator[Tokens, None]:
    """Continue ``request`` on another engine, ``wanted`` if it is there, with the KV that ``source`` has.

    Raises :class:`MoveFailed` for whatever goes wrong before the first new token.
    """
    leaving = mesh.departing(source)
    num_chunks = 0
    try:
        chosen = [engine for engine in mesh.engines() if engine.id == wanted != source.engine_id]
        others = [] if chosen else [engine for engine in mesh.engines() if engine.id == source.engine_id]
        target = chosen[0] if chosen else mesh.pick("decode", request, exclude=others, can=[PREP_RECV])
        # The newest token has no KV yet: its block is left to the target.
        end = (request.num_tokens - 1) // request.block_size * request.block_size
        async with asyncio.timeout(GRANT_S):
            grant = await target.prep_recv(request, end=end)
        sending = leaving.remote_send(request, grant, end=end, first_token=False)
        if sending.is_settled:  # the target has all of it
            leaving.abort(request)

        def tell(sending: Sending) -> None:
            if sending.sent is not None:
                _logger.info(
                    log.REQUEST_MOVED,
                    request_id=request.request_id,
                    source=source.engine_id,
                    target=target.id,
                    tokens=grant.end,
                    matched=grant.matched,
                    sent=sending.sent.sent,
                    computed=sending.sent.computed,
                )

        sending.listen(tell)
        async for tokens in target.start_generate(request, begin=grant.end, grant=grant):
            yield tokens
            num_chunks += 1
    except EngineLeaving:
        raise
    except (MeshError, TimeoutError) as error:
        if num_chunks:
            raise
        leaving.abort(request)
        failure = MoveFailed(f"from {source.engine_id}: {str(error) or 'no room elsewhere in time'}")
        failure.suspect = getattr(error, "suspect", "")
        raise failure from error
