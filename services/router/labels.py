"""Labels that a strategy gives engines for its own picks (view.py looks here first).

Sans-I/O. They are one strategy's in one router, so no two strategies or routers can fight over them. What the
mesh says of an engine (the operator's labels, or those that it announces) is the older word: when that
changes, the strategy's own labels of the engine end. Knows no sockets.
"""

from __future__ import annotations

from collections.abc import Sequence

from microserve.protocol.errors import StrategyError
from microserve.protocol.messages.control import fault_of_labels

MAX_ENGINES = 1024
"""Beyond that the label that was given first is forgotten: engines that are gone must not add up."""


class OwnLabels:
    """By engine id, which outlives an engine's lives."""

    def __init__(self) -> None:
        self._given: dict[str, tuple[Sequence[str], Sequence[str]]] = {}
        """What the strategy says, and what the mesh said then."""

    def __len__(self) -> int:
        return len(self._given)

    def give(self, engine_id: str, labels: Sequence[str], shared: Sequence[str]) -> None:
        """``shared``: what the mesh says of it now. Without labels that counts again.

        Raises ``StrategyError`` for what cannot be a label.
        """
        if fault := fault_of_labels(labels):
            raise StrategyError(f"engine {engine_id}: {fault}")
        self._given.pop(engine_id, None)
        if labels:
            self._given[engine_id] = (tuple(labels), tuple(shared))
        if len(self._given) > MAX_ENGINES:
            del self._given[next(iter(self._given))]

    def of(self, engine_id: str, shared: Sequence[str]) -> Sequence[str]:
        """Those that count now, where the mesh says ``shared``."""
        given = self._given.get(engine_id)
        if given is None:
            return shared
        if given[1] != tuple(shared):
            del self._given[engine_id]
            return shared
        return given[0]
