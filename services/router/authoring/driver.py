"""Runs the code of strategies for the router: a step, a plan, a rehearsal; each timed, and broken off.

Owns what a strategy's code may do to the router: hold it (overseer.py), end it, cancel itself. Keeps nothing
between two runs. What a mistake means for a request is attempt.py's; knows no live requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

import structlog

from microserve.protocol import log
from microserve.protocol.errors import StrategyError
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.authoring.overseer import Overseer, StrategyHung
from microserve.services.router.authoring.view import MeshView

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

    async def step(self, awaitable: Awaitable[T], on_slow: Callable[[float], None]) -> T:
        """Await what a strategy does next; ``on_slow`` hears the seconds for which it held the router if
        those were too many. Raises what it raises, :class:`StrategyHung` where it was broken off."""
        return await (awaitable if self._overseer is None else self._overseer.run(awaitable, on_slow))

    def hung(self, strategy: str, version: int, mistake: StrategyHung) -> None:
        """This version was broken off in a request."""
        self._on_hung(strategy, version, mistake.detail)

    async def run_plan(self, strategy: Strategy, mesh: MeshView) -> None:
        """Run a strategy's plan until it returns. Raises what it raises."""

        def tell(seconds: float) -> None:
            tell_slow(strategy.name, strategy.version, "plan", seconds)

        try:
            await self.step(strategy.start_plan(mesh), tell)
        except StrategyHung as error:
            self._on_hung(strategy.name, strategy.version, f"its plan: {error.detail}")
            raise
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as mistake:
            raise ending(mistake) from None

    async def rehearse(self, strategy: Strategy, generator: AsyncGenerator[Tokens, None]) -> None:
        """Run it for a shadow (shadow.py), to the end of what it yields. Raises its mistake."""
        slow_s: list[float] = []
        try:
            try:
                while True:
                    chunk = await self.step(generator.__anext__(), slow_s.append)
                    if not isinstance(chunk, Tokens):
                        raise StrategyError(f"the strategy yielded {type(chunk).__name__}, not Tokens")
                    if chunk.finished is not None:
                        break
            finally:
                await self.step(generator.aclose(), slow_s.append)
        except StopAsyncIteration:
            raise StrategyError("the strategy ended before its stream did") from None
        except StrategyHung as mistake:
            self.hung(strategy.name, strategy.version, mistake)
            raise
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as mistake:
            raise ending(mistake) from None
        if slow_s:
            raise StrategyError(f"it held the router for {max(slow_s):.3f} s")


def ending(mistake: BaseException) -> StrategyError:
    """Of a strategy that raised ``SystemExit`` or the like: signals come to a service by its loop."""
    return StrategyError(f"the strategy wanted to end the router: {type(mistake).__name__}")


def tell_slow(strategy: str, version: int, request_id: str, seconds: float) -> None:
    _logger.warning(
        log.STRATEGY_SLOW,
        request_id=request_id,
        strategy=strategy,
        strategy_version=version,
        held_s=round(seconds, 3),
    )
