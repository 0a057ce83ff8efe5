"""Control states as tests publish them, and a router's control of them without a router."""

from __future__ import annotations

import hashlib

from microserve.protocol.messages.strategy.control import ControlEntry, ControlState, Scalar, StrategyVersion
from microserve.services.router.rollout.book import StrategyBook
from microserve.services.router.rollout.control import StrategyControl
from microserve.services.router.strategies import BUILT_IN

PLAIN = """
from microserve.services.router.authoring import strategy

@strategy
async def mine(mesh, request, *, label: str = "", ratio: float = 0.1):
    '''Version {number}.'''
    async for tokens in mesh.pick(label or None, request).start_generate(request):
        yield tokens
"""


def version(number: int, source: str = PLAIN, **parameters: Scalar) -> StrategyVersion:
    digest = hashlib.sha256(source.encode()).hexdigest() if source else ""
    return StrategyVersion(number, source, digest, parameters)


def state(number: int, *entries: ControlEntry) -> ControlState:
    return ControlState(number, list(entries))


def serving(number: int, source: str = PLAIN, name: str = "mine", **parameters: Scalar) -> ControlState:
    """A state whose last change made this version."""
    return state(number, ControlEntry(name, version(number, source, **parameters)))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make() -> tuple[StrategyBook, StrategyControl, Clock]:
    book, clock = StrategyBook(BUILT_IN), Clock()
    return book, StrategyControl(book, clock), clock
