"""The mesh as one request's strategy sees it: engines, their labels and load, who holds which prefix.

The base layer of every decision; owns no state of its own. Knows no sockets and no strategy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

from microserve.protocol.errors import NoEngines
from microserve.services.router.connection import EngineConnection
from microserve.services.router.engine import Engine
from microserve.services.router.load import Load, LoadBook
from microserve.services.router.request import Request
from microserve.services.router.scope import RequestScope

RETRY_AFTER_S = 1.0

Lookup = Callable[[Request], dict[str, int]]
"""Engine id -> tokens of the prompt that it holds from the start."""


class Mesh:
    """Made for one request; membership and load are as of each call."""

    def __init__(
        self,
        scope: RequestScope,
        connections: Callable[[], list[EngineConnection]],
        book: LoadBook,
        lookup: Lookup,
        rng: random.Random,
    ) -> None:
        """``connections`` lists the engines that may take new work."""
        self._scope = scope
        self._connections = connections
        self._book = book
        self._lookup = lookup
        self._rng = rng
        self._matched: dict[str, int] | None = None

    def engines(self, label: str | None = None) -> list[Engine]:
        """Engines with ``label``; one without any label serves every label. If no engine has it: all.

        Labels are preferences and not roles, so an empty list means that nobody is alive.
        """
        everyone = self._connections()
        fit = [c for c in everyone if label is None or not c.info.labels or label in c.info.labels]
        return [Engine(connection, self._scope, self._cached) for connection in fit or everyone]

    def departing(self, connection: EngineConnection) -> Engine:
        """An engine that drains: not among :meth:`engines`, but it still sends what it holds."""
        return Engine(connection, self._scope, self._cached)

    def pick(
        self,
        label: str | None,
        request: Request,
        *,
        exclude: Collection[Engine] = (),
        prefix: bool = False,
        cost: Callable[[Engine], float] | None = None,
    ) -> Engine:
        """The engine with the least work (uncached tokens, then sequences); equals by lot.

        ``cost`` or else ``prefix`` counts first: the least of your own measure, or the longest prefix of the
        prompt. ``exclude`` yields when nobody else is left, so a mesh of one engine serves every strategy.
        Raises :class:`NoEngines`.
        """
        self._scope.check(request)
        if cost is None and prefix:
            matched = self.prefix(request)

            def cost(engine: Engine) -> float:
                return -matched.get(engine.id, 0)

        def rank(engine: Engine) -> tuple[float, Load]:
            return (cost(engine) if cost is not None else 0.0, self.load(engine))

        labelled = self.engines(label)
        candidates = (
            [e for e in labelled if e not in exclude]
            or [e for e in self.engines() if e not in exclude]
            or labelled
        )
        if not candidates:
            raise NoEngines("no engine is alive", retry_after_s=RETRY_AFTER_S)
        ranked = [(rank(engine), engine) for engine in candidates]
        least = min(position for position, _ in ranked)
        return self._rng.choice([engine for position, engine in ranked if position == least])

    def load(self, engine: Engine) -> Load:
        """Work on the engine now: our own book and its last report, whichever is more."""
        return self._book.load(engine.id, engine.reported)

    def prefix(self, request: Request) -> dict[str, int]:
        """Prompt tokens that each engine holds from the start, by engine id; engines with none are absent."""
        self._scope.check(request)
        if self._matched is None:
            self._matched = self._lookup(request)
        return self._matched

    def uncached(self, engine: Engine, request: Request) -> int:
        """Prompt tokens that the engine would have to compute or receive."""
        return request.num_tokens - self.prefix(request).get(engine.id, 0)

    def _cached(self, engine_id: str) -> int:
        return self.prefix(self._scope.request).get(engine_id, 0)
