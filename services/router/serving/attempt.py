"""One run of a strategy for one request: passes its chunks on, bounds it, and says what its end means.

A mistake of the strategy is told to its author here and blamed on its version; which mistakes the client
hears of is failover.py's. Bounds: the request's deadline; ``idle_s`` in which it neither waits for an engine
nor yields; and how long its code may hold the loop (driver.py). Knows no gateways and no engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import structlog

from microserve.protocol import log
from microserve.protocol.errors import InvalidInterval, MeshError, StrategyError
from microserve.protocol.messages.router import Output, Served
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.action.generating import Chunks, Generating
from microserve.services.router.authoring.driver import Driver, ending, line_of, tell_slow
from microserve.services.router.oversight.mistake import place_of
from microserve.services.router.oversight.overseer import Condemned, StrategyHung
from microserve.services.router.request.scope import RequestScope, out_of_time
from microserve.services.router.serving.live import LiveRequest

CLOSE_S = 1.0
"""What stands in a strategy's ``finally`` gets this long; its request has ended before."""

T = TypeVar("T")

_logger = structlog.get_logger()


class Attempts:
    """Runs strategies; keeps nothing between two runs."""

    def __init__(self, driver: Driver, *, idle_s: float) -> None:
        self._driver = driver
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()

    async def run(self, live: LiveRequest, scope: RequestScope, generator: Chunks) -> MeshError | None:
        """The attempt's error, or None when ``live.last`` ends the stream or the client left."""
        limit = asyncio.timeout_at(scope.request.deadline)
        try:
            async with limit:
                watch = _IdleWatch(scope, limit, self._idle_s)
                try:
                    live.last = await self._drive(live, scope, generator)
                finally:
                    watch.stop()
                    live.keep(scope)
        except asyncio.CancelledError:
            if live.interrupt is None and not _is_cancelled():
                return self.blame(live, StrategyError("the strategy cancelled itself"))
            return live.interruption
        except Condemned as error:
            return error
        except (InvalidInterval, StrategyError) as mistake:
            return self.blame(live, mistake)
        except MeshError as failure:
            return failure
        except ExceptionGroup as group:
            return _first_failure(group) or self.blame(live, group)
        except Exception as mistake:
            if not (isinstance(mistake, TimeoutError) and limit.expired()):
                return self.blame(live, mistake)
            if watch.has_fired:
                idle = StrategyError(f"for {self._idle_s:g} s it waited for no engine and yielded nothing")
                idle.at = place_of(mistake)
                return self.blame(live, idle)
            return out_of_time()
        except BaseException as mistake:  # signals come to a service by its loop, never as this
            return self.blame(live, ending(mistake))
        return None

    async def _drive(self, live: LiveRequest, scope: RequestScope, generator: Chunks) -> Tokens:
        """Pass the chunks on; returns the one that ends the stream, which goes out with the end."""
        try:
            return await self._pass_chunks(live, scope, generator)
        except StrategyError as mistake:
            if not place_of(mistake):  # of ours, about what it has yielded
                mistake.at = line_of(generator)
            raise

    async def _pass_chunks(self, live: LiveRequest, scope: RequestScope, generator: Chunks) -> Tokens:
        while True:
            try:
                chunk = await self._oversee(live, generator.__anext__())
            except StopAsyncIteration:
                raise StrategyError("the strategy ended before its stream did") from None
            if live.interrupt is not None:  # the strategy swallowed its cancellation
                raise asyncio.CancelledError
            if self._loop.time() >= scope.request.deadline:
                raise out_of_time()
            if isinstance(chunk, Generating):
                return await self._pass_on(live, scope, chunk)
            if not isinstance(chunk, Tokens):
                raise StrategyError(f"the strategy yielded {type(chunk).__name__}, not Tokens")
            if chunk.offset != len(live.delivered):
                raise StrategyError(f"the strategy yielded token {chunk.offset}, not {len(live.delivered)}")
            if not scope.has_given(chunk):
                raise StrategyError("the strategy yielded tokens that no engine gave")
            _take(live, scope, chunk)
            if chunk.finished is not None:
                return chunk

    async def _pass_on(self, live: LiveRequest, scope: RequestScope, generation: Generating) -> Tokens:
        """All that a generation still brings, without the strategy: no task is woken for a token."""
        if not generation.is_of(scope):
            raise StrategyError("the strategy yielded a generation of another request")
        if generation.offset != len(live.delivered):
            raise StrategyError(
                f"the strategy yielded a generation at token {generation.offset}, not {len(live.delivered)}"
            )

        def tell(chunk: Tokens) -> None:
            if live.interrupt is None:
                _take(live, scope, chunk)

        try:
            last = await generation.pass_on(tell)
        except StopAsyncIteration:
            raise StrategyError("the strategy yielded a generation that had ended") from None
        if live.interrupt is not None:
            raise asyncio.CancelledError
        _take(live, scope, last)
        return last

    async def close(self, live: LiveRequest, generator: Chunks) -> None:
        """Run what stands in the strategy's ``finally``, and end the tasks that it has left."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._oversee(live, generator.aclose())
        except Condemned:
            pass
        except Exception as mistake:
            # The request has ended: what a strategy's ``finally`` raises concerns its author only.
            self.blame(live, mistake)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            self.blame(live, StrategyError("the strategy cancelled itself"))
        except BaseException as mistake:
            self.blame(live, ending(mistake))
        finally:
            if live.author is not None:
                live.author.end()

    async def _oversee(self, live: LiveRequest, awaitable: Awaitable[T]) -> T:
        def tell(seconds: float) -> None:
            if not live.is_slow:
                live.is_slow = True
                tell_slow(live.strategy, live.version, live.request_id, seconds, self._driver.place)

        return await self._driver.step(live.author, awaitable, tell)

    def blame(self, live: LiveRequest, mistake: Exception) -> StrategyError:
        """The strategy's own fault: its author gets the traceback, whoever asks gets ``StrategyError``."""
        live.is_blamed = True
        _logger.error(
            log.STRATEGY_FAILED,
            request_id=live.request_id,
            strategy=live.strategy,
            strategy_version=live.version,
            error=str(mistake),
            at=place_of(mistake),
            exc_info=mistake,
        )
        if isinstance(mistake, StrategyHung) and live.author is not None:
            live.author.condemn(mistake.detail)
        if isinstance(mistake, StrategyError):
            return mistake
        return StrategyError(f"{live.strategy}: {type(mistake).__name__}: {mistake}")


def _take(live: LiveRequest, scope: RequestScope, chunk: Tokens) -> None:
    """A chunk is delivered; the last one goes out with the end."""
    live.delivered += chunk.token_ids
    rows = None if chunk.prompt is None else live.fresh_rows(chunk.prompt)
    served: Served | None = None
    if (chunk.token_ids or rows) and not live.is_class_told:
        served = Served(live.strategy, live.version, [*live.engines, *scope.engines])
    numerics = live.made_in(scope.numerics) if chunk.token_ids or rows else None
    if chunk.finished is None:
        output = (chunk.offset, chunk.token_ids, chunk.logprobs)
        live.sink(Output(live.request_id, *output, None, numerics, served, rows))
    elif rows is not None:
        live.sink(Output(live.request_id, chunk.offset, [], [], None, numerics, served, rows))
    if (
        chunk.finished is not None and chunk.finished.numerics.name
    ):  # the engine may know of what the router does not
        live.made_in(chunk.finished.numerics)


class _IdleWatch:
    """Ends ``limit`` when the strategy has for so long waited for nothing that an engine does."""

    def __init__(self, scope: RequestScope, limit: asyncio.Timeout, idle_s: float) -> None:
        self.has_fired = False
        self._scope = scope
        self._limit = limit
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(idle_s, self._look)

    def _look(self) -> None:
        left_s = self._idle_s - self._scope.idle_s
        if left_s > 0.0:
            self._timer = self._loop.call_later(left_s, self._look)
            return
        if not self._limit.expired():  # else its deadline is over, and it goes on all the same
            self.has_fired = True
            self._limit.reschedule(self._loop.time())

    def stop(self) -> None:
        self._timer.cancel()


def _is_cancelled() -> bool:
    """From outside, and not by the strategy."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _first_failure(group: ExceptionGroup[Exception]) -> MeshError | None:
    """What a strategy's own task group failed of, if it is no mistake of the strategy."""
    for error in group.exceptions:
        found = _first_failure(error) if isinstance(error, ExceptionGroup) else error
        if isinstance(found, MeshError) and not isinstance(found, StrategyError | InvalidInterval):
            return found
    return None
