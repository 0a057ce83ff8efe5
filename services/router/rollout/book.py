"""The strategies that a router knows by name: those it came with, and what the control topic put before them.

Plain state: which version serves a request is decided by the request's id, or one of its attributes, alone.
Loads and runs nothing (control.py does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from microserve.protocol.errors import ConfigError, StrategyNotFound
from microserve.protocol.messages.strategy.control import StrategyServed
from microserve.protocol.messages.strategy.scores import CANARY, STABLE
from microserve.protocol.settings.faults import did_you_mean
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.request.request import NO_ATTRIBUTES


@dataclass(frozen=True, slots=True)
class Published:
    """What the control topic serves under one name."""

    stable: Strategy
    canary: Strategy | None = None
    share: float = 0.0
    """Of the requests, 0 to 1, those that the canary serves."""
    shadow: Strategy | None = None
    """Decides, serves nothing (shadow.py)."""
    shadow_share: float = 0.0
    sticky_by: str = ""
    """Attribute whose values the canary serves or does not; empty: requests, one by one."""
    shadow_sticky_by: str = ""

    def choose(self, request_id: str, attributes: Mapping[str, str] = NO_ATTRIBUTES) -> Strategy:
        """By the request's id alone, or by the value of an attribute: the same on every router, and a larger
        share only adds requests."""
        if self.canary is None:
            return self.stable
        lot = _lot(self.stable.name, request_id, attributes.get(self.sticky_by))
        return self.canary if lot < self.share else self.stable

    def choose_shadow(
        self, request_id: str, attributes: Mapping[str, str] = NO_ATTRIBUTES
    ) -> Strategy | None:
        """As :meth:`choose`, by lots of its own."""
        if self.shadow is None:
            return None
        lot = _lot(f"shadow {self.stable.name}", request_id, attributes.get(self.shadow_sticky_by))
        return self.shadow if lot < self.shadow_share else None


def _lot(name: str, request_id: str, value: str | None) -> float:
    """In [0, 1), even, and always the same for the same value; where there is none, for the same request."""
    drawn = f"value {value}" if value else request_id
    digest = hashlib.blake2b(f"{name} {drawn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


class StrategyBook:
    """The strategies of a router by name, with the operator's parameters."""

    def __init__(self, strategies: Iterable[Strategy]) -> None:
        self.published: Mapping[str, Published] = MappingProxyType({})
        """Goes before what the router came with; replaced whole (control.py)."""
        self._strategies: dict[str, Strategy] = {}
        self._suspended: dict[tuple[str, int], Strategy] = {}
        for item in strategies:
            self.add(item)

    def add(self, item: Strategy) -> None:
        """Raises :class:`ConfigError` when the name is taken."""
        if item.name in self._strategies:
            raise ConfigError(f"two strategies are named {item.name}", field="router.strategy_files")
        self._strategies[item.name] = item

    @property
    def names(self) -> list[str]:
        return sorted({*self._strategies, *self.published})

    def serving(self) -> list[Strategy]:
        """All that may serve the next request."""
        own = [strategy for name, strategy in self._strategies.items() if name not in self.published]
        published = [each for item in self.published.values() for each in (item.stable, item.canary)]
        return own + [each for each in published if each is not None]

    def own(self, name: str) -> Strategy | None:
        """The strategy that the router came with."""
        return self._strategies.get(name)

    def get(self, name: str, request_id: str = "", attributes: Mapping[str, str] = NO_ATTRIBUTES) -> Strategy:
        """For one request, whose id or attributes decide on canaries. Raises :class:`StrategyNotFound`."""
        published = self.published.get(name)
        found = self._strategies.get(name) if published is None else published.choose(request_id, attributes)
        if found is None:
            known = ", ".join(self.names)
            raise StrategyNotFound(f"no strategy {name!r} (there are: {known})", field="strategy")
        return self.current(found)

    def current(self, found: Strategy) -> Strategy:
        """What serves instead of a strategy that was got before, if that has been suspended since."""
        return self._suspended.get((found.name, found.version), found)

    def share_of(self, strategy: Strategy) -> str:
        """As what one that was got serves: ``stable`` or ``canary``."""
        published = self.published.get(strategy.name)
        canary = None if published is None else published.canary
        return CANARY if canary is not None and canary.version == strategy.version else STABLE

    def is_on_trial(self, name: str) -> bool:
        """Two versions serve under that name."""
        published = self.published.get(name)
        return published is not None and published.canary is not None

    def shadow(
        self, name: str, request_id: str, attributes: Mapping[str, str] = NO_ATTRIBUTES
    ) -> Strategy | None:
        """The version that decides about this request beside the one that serves it, if there is one."""
        published = self.published.get(name)
        found = published.choose_shadow(request_id, attributes) if published is not None else None
        return None if found is None or (name, found.version) in self._suspended else found

    def serves(self) -> list[StrategyServed]:
        """Under every name: which version is the stable one, and which have been suspended."""
        return [
            StrategyServed(
                name,
                self.published[name].stable.version if name in self.published else 0,
                sorted(version for suspended, version in self._suspended if suspended == name),
            )
            for name in self.names
        ]

    def suspend(self, name: str, version: int, instead: Strategy) -> None:
        """From the next request on ``instead`` serves for this version, as long as this router lives."""
        self._suspended[name, version] = replace(instead, name=name)

    def configure(self, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        """Apply ``[router.strategies.<name>]``. Raises :class:`ConfigError` naming the path."""
        for name, values in parameters.items():
            if name not in self._strategies:
                path = f"router.strategies.{name}"
                meant = did_you_mean(name, self.names)
                raise ConfigError(
                    f"{path}: no such strategy (there are: {', '.join(self.names)}){meant}", field=path
                )
            self._strategies[name] = self._strategies[name].bind(values)
