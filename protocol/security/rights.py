"""Roles, and what each may ask for: the one table of rights (WIRE.md 9).

Owns names and the table. Does not know whose key has which role (trust.py). Every owner of a socket asks
:func:`check` before it does what a message asks for; sockets that hear nothing they could check (KV events)
are closed to other roles at the door, by their entrance.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, get_args

from microserve.protocol.errors import NotPermitted
from microserve.protocol.messages import engine, index, router, world
from microserve.protocol.messages.strategy import control, decisions


class Role(StrEnum):
    """What a key stands for; one key may stand for several."""

    INDEX = "index"
    ENGINE = "engine"
    ROUTER = "router"
    GATEWAY = "gateway"
    OPERATOR = "operator"
    SERVICE = "service"
    """Trusted, and of no role that was said: any service of the mesh, and no operator."""
    LOCAL = "local"
    """Nobody here has keys (``bus.insecure``): everything is allowed."""


class Entrance(StrEnum):
    """The sockets that others connect to."""

    ENGINE = "engine"
    EVENTS = "events"
    REPLAY = "replay"
    ROUTER = "router"
    INDEX = "index"
    OPEN = "open"
    """KV events and replay of an engine that says so (``engine.events_open``): no keys, everybody enters."""
    ANY = "any"
    """Of no service: tests and tools."""


Roles = frozenset[Role]
NOBODY: Final[Roles] = frozenset()
EVERYBODY: Final[Roles] = frozenset({Role.LOCAL})
"""What the peers of a socket without keys are."""

APPLY_CONTROL: Final = "apply control"
"""A ``Watch`` that says what its sender runs: it counts as a router, and its faults take versions back."""
READ_EVENTS: Final = "read events"
READ_REPLAY: Final = "read replay"

_ROUTER: Final[Roles] = frozenset({Role.ROUTER})
_GATEWAY: Final[Roles] = frozenset({Role.GATEWAY})
_ENGINE: Final[Roles] = frozenset({Role.ENGINE})
_OPERATOR: Final[Roles] = frozenset({Role.OPERATOR})
_ASKS: Final[Roles] = frozenset({Role.ROUTER, Role.OPERATOR})
_SHOWS: Final[Roles] = frozenset({Role.GATEWAY, Role.OPERATOR})
"""What a gateway shows to operators: it changes nothing."""
_READS: Final[Roles] = frozenset({Role.INDEX, Role.ROUTER, Role.OPERATOR})

RIGHTS: Final[Mapping[Any, Roles]] = MappingProxyType(
    {
        # to an engine (WIRE.md 4.1)
        engine.Hello: _READS,
        engine.Ping: _READS,
        engine.Stats: _READS,
        engine.Snapshot: _READS,
        engine.PrepRecv: _ASKS,
        engine.RemoteSend: _ASKS,
        engine.StartGenerate: _ASKS,
        engine.Commit: _ASKS,
        engine.Abort: _ASKS,
        engine.Release: _ASKS,
        engine.Credit: _ASKS,
        engine.Drain: _OPERATOR,
        # what an engine tells of its cache (7)
        READ_EVENTS: _READS,
        READ_REPLAY: _READS,
        # to a router (5.1)
        router.GatewayHello: _GATEWAY,
        router.GatewayPing: _GATEWAY,
        router.Generate: _GATEWAY,
        router.Cancel: _GATEWAY,
        router.StreamCredit: _GATEWAY,
        # to the index (6.1)
        index.Register: _ENGINE,
        index.Beat: _ENGINE,
        index.Deregister: _ENGINE,
        world.JoinWorld: _ENGINE,
        index.Watch: _ASKS | _GATEWAY,
        APPLY_CONTROL: _ROUTER,
        index.Lookup: _ASKS,
        index.IndexStats: _ASKS | _GATEWAY,
        control.ControlStatus: _SHOWS,
        control.ControlHistory: _SHOWS,
        control.Change: _OPERATOR,
        decisions.Explain: _SHOWS,
        decisions.Answer: _ROUTER,
    }
)
"""Who may, by message or by name. ``SERVICE`` may all but ``Change``, ``LOCAL`` everything."""

_ACTIONS: Final[Mapping[Entrance, tuple[Any, ...]]] = {
    Entrance.ENGINE: get_args(engine.EngineRequest),
    Entrance.EVENTS: (READ_EVENTS,),
    Entrance.REPLAY: (READ_REPLAY,),
    Entrance.ROUTER: get_args(router.RouterRequest),
    Entrance.INDEX: get_args(index.IndexRequest),
    Entrance.ANY: tuple(RIGHTS),
}


def may(roles: Roles, action: Any) -> bool:
    """Whether one of the roles has the right; ``action`` is a message's type or one of the names here."""
    if Role.LOCAL in roles or roles & RIGHTS[action]:
        return True
    return Role.SERVICE in roles and action is not control.Change


def check(roles: Roles, action: Any) -> None:
    """Raises :class:`NotPermitted`."""
    if not may(roles, action):
        name = action if isinstance(action, str) else action.__name__
        raise NotPermitted(f"{name} is not for {' and '.join(sorted(roles)) or 'strangers'}")


def may_enter(roles: Roles, entrance: Entrance) -> bool:
    """Whether one of the roles has any right behind that socket."""
    return any(may(roles, action) for action in _ACTIONS[entrance])
