"""Runs the code of strategies for the router: a step, a plan, a rehearsal; each timed, and broken off.

Owns what a strategy's code may do to the router: hold it (../oversight), end it, cancel itself; and which
versions have hung here. What a mistake means for a request is attempt.py's; knows no live requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import AsyncGeneratorType
from typing import Any, TypeVar, cast

import structlog

from microserve.protocol import log
from microserve.protocol.errors import StrategyError
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.action.generating import Chunks, Generating
from microserve.services.router.authoring.definition import Strategy, StrategyFunction
from microserve.services.router.authoring.view import MeshView
from microserve.services.router.oversight.author import AUTHOR, Author, Verdict, keep_tasks
from microserve.services.router.oversight.cut import BrokenOff
from microserve.services.router.oversight.mistake import place_of
from microserve.services.router.oversight.overseer import Overseer, StrategyHung
from microserve.services.router.request.outcome import Outcome
from microserve.services.router.request.request import Request

T = TypeVar("T")
OnHung = Callable[[str, int, str], None]
"""Strategy, version, what it did."""

_logger = structlog.get_logger()


class Driver:
    """One a router."""

    def __init__(self, overseer: Overseer | None, on_hung: OnHung) -> None:
        """Without an overseer a strategy may hold the loop for as long as it likes (virtual time).

        ``on_hung`` hears of each version that had to be broken off.
        """
        self._overseer = overseer
        self._on_hung = on_hung
        self._verdicts: dict[tuple[str, int, StrategyFunction], Verdict] = {}
        keep_tasks(asyncio.get_running_loop())

    @property
    def place(self) -> str:
        """``FILE:LINE`` where a strategy stood that has just held the router for too long, if it was seen."""
        return self._overseer.place if self._overseer is not None else ""

    def author(self, strategy: Strategy) -> Author:
        """For one run of it; ``end`` it when that is over."""
        key = (strategy.name, strategy.version, strategy.function)

        def stray(reason: str) -> None:
            _logger.error(
                log.STRATEGY_FAILED, strategy=strategy.name, strategy_version=strategy.version, error=reason
            )
            condemn(reason)

        def condemn(reason: str) -> None:
            before = self._verdicts.get(key, Verdict.FREE)
            self._verdicts[key] = Verdict.CONDEMNED if before is Verdict.FREE else Verdict.ABANDONED
            self._on_hung(strategy.name, strategy.version, reason)

        return Author(
            strategy.name,
            strategy.version,
            lambda: self._verdicts.get(key, Verdict.FREE),
            on_stray=stray,
            condemn=condemn,
        )

    async def step(
        self, author: Author | None, awaitable: Awaitable[T], on_slow: Callable[[float], None]
    ) -> T:
        """Await what a strategy does next; ``on_slow`` hears the seconds for which it held the router if
        those were too many. ``author`` None: code of the router's own. Raises what it raises,
        :class:`StrategyHung` where it was broken off, ``Condemned`` where its version was."""
        if author is None:
            return await awaitable
        token = AUTHOR.set(author)
        try:
            if self._overseer is None:
                return await awaitable
            return await self._overseer.run(awaitable, author, on_slow)
        finally:
            AUTHOR.reset(token)

    async def run_plan(self, strategy: Strategy, mesh: MeshView) -> None:
        """Run a strategy's plan until it returns. Raises what it raises."""
        await self._run(strategy, strategy.start_plan(mesh), "plan")

    async def tell_end(self, strategy: Strategy, mesh: MeshView, request: Request, outcome: Outcome) -> None:
        """Let a strategy's ``on_end`` hear of a request. Raises what it raises."""
        await self._run(strategy, strategy.tell_end(mesh, request, outcome), "on_end")

    async def _run(self, strategy: Strategy, awaitable: Awaitable[None], what: str) -> None:
        def tell(seconds: float) -> None:
            tell_slow(strategy.name, strategy.version, what, seconds, self.place)

        author = self.author(strategy)
        try:
            await self.step(author, awaitable, tell)
        except StrategyHung as error:
            author.condemn(f"its {what}: {error.detail}")
            raise
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as mistake:
            raise ending(mistake) from None
        finally:
            author.end()

    async def rehearse(self, strategy: Strategy, generator: Chunks) -> None:
        """Run it for a shadow (shadow.py), to the end of what it yields. Raises its mistake."""
        slow_s: list[float] = []
        author = self.author(strategy)
        try:
            try:
                while True:
                    chunk = await self.step(author, generator.__anext__(), slow_s.append)
                    if isinstance(chunk, Generating):
                        chunk = await chunk.pass_on(lambda tokens: None)
                    if not isinstance(chunk, Tokens):
                        raise StrategyError(f"the strategy yielded {type(chunk).__name__}, not Tokens")
                    if chunk.finished is not None:
                        break
            finally:
                await self.step(author, generator.aclose(), slow_s.append)
        except StopAsyncIteration:
            raise StrategyError("the strategy ended before its stream did") from None
        except StrategyHung as mistake:
            author.condemn(mistake.detail)
            raise
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as mistake:
            raise ending(mistake) from None
        finally:
            author.end()
        if slow_s:
            raise StrategyError(f"it held the router for {max(slow_s):.3f} s")


def ending(mistake: BaseException) -> StrategyError:
    """Of a strategy that raised ``SystemExit`` or the like (signals come to a service by its loop), or that
    was broken off in an object that it had handed on."""
    is_hung = isinstance(mistake, BrokenOff)
    ended = f"the strategy wanted to end the router: {type(mistake).__name__}"
    error = StrategyHung(str(mistake)) if is_hung else StrategyError(ended)
    error.at = place_of(mistake)
    return error


def line_of(strategy: Chunks) -> str:
    """``FILE:LINE`` of the ``yield`` at which it stands; empty if it has ended."""
    generator = cast(AsyncGeneratorType[Any, Any], strategy)
    frame = generator.ag_frame
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""


def tell_slow(strategy: str, version: int, request_id: str, seconds: float, at: str) -> None:
    """``at``: ``FILE:LINE`` where it was seen."""
    _logger.warning(
        log.STRATEGY_SLOW,
        request_id=request_id,
        strategy=strategy,
        strategy_version=version,
        held_s=round(seconds, 3),
        at=at,
    )
