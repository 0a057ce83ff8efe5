"""What the doctor has seen of a mesh, from where it runs. Plain data: judging.py says what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from microserve.protocol.messages.engine import EngineInfo, EngineLoad
from microserve.protocol.messages.host import UNSAID_HOST, HostFacts
from microserve.protocol.messages.index import IndexReport


class Reach(StrEnum):
    """What came of connecting to an address."""

    REACHED = "reached"
    REFUSED = "refused"
    """The host answers that nobody listens there."""
    SILENT = "silent"
    """Nothing answers: no host, no route, or a firewall that drops."""
    NO_HANDSHAKE = "no handshake"
    """Somebody listens, and does not let us in: a wrong key, or no service of a mesh."""
    NO_ADDRESS = "no address"
    """It cannot be one, or its name means nothing here."""


@dataclass(frozen=True, slots=True)
class Place:
    """One address of one service."""

    what: str
    """``index``, ``actions``, ``events``, ``replay`` or ``HTTP``."""
    address: str
    reach: Reach = Reach.REACHED
    detail: str = ""


@dataclass(frozen=True, slots=True)
class HostSeen:
    """A process's machine, as it says itself."""

    who: str
    facts: HostFacts
    clock_off_s: float | None = None
    """Its clock less ours; None: it does not say."""
    uncertain_s: float = 0.0
    """Half of the round trip by which that was measured."""


@dataclass(frozen=True, slots=True)
class EngineSeen:
    info: EngineInfo
    load: EngineLoad
    places: list[Place] = field(default_factory=list)
    host: HostSeen | None = None
    error: str = ""
    """Why it could not be asked; empty: it answered."""


@dataclass(frozen=True, slots=True)
class RouterSeen:
    """A router, as the index knows it."""

    router_id: str
    version: str = ""
    """Empty of one that says none."""
    host: HostSeen | None = None


@dataclass(frozen=True, slots=True)
class GatewaySeen:
    url: str
    place: Place
    version: str = ""
    """Empty of one that says none."""
    host: HostSeen | None = None
    error: str = ""
    """Why it could not be asked."""
    unready: str = ""
    """Why no request could be served through it now."""

    @property
    def is_reached(self) -> bool:
        return self.place.reach is Reach.REACHED


@dataclass(frozen=True, slots=True)
class LinkSeen:
    """KV that one engine sent to another."""

    source: str
    target: str
    heap: str = ""
    """What it went through."""
    nbytes: int = 0
    seconds: float = 0.0
    """That those bytes took, with the sender's cache warm."""
    error: str = ""

    @property
    def bytes_per_s(self) -> float:
        """0: nothing was measured."""
        return self.nbytes / self.seconds if self.seconds > 0.0 and not self.error else 0.0


@dataclass(frozen=True, slots=True)
class AnswerSeen:
    """The same prompt, answered once more."""

    how: str
    """``cold``, ``cached`` or ``transferred``."""
    engine_id: str
    token_ids: list[int] = field(default_factory=list)
    found_tokens: int = 0
    """Of the prompt, those that were in its cache, or came from another engine."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class CacheSeen:
    """Answers to one prompt that has been asked of nobody before."""

    answers: list[AnswerSeen] = field(default_factory=list)
    is_exact: bool = False
    """All engines that took part are of one exact numerics class: their bits are promised."""


@dataclass(frozen=True, slots=True)
class Observation:
    index: Place
    has_keys: bool = True
    """We have keys ourselves."""
    version: str = ""
    """Ours."""
    own: HostSeen = HostSeen("doctor", UNSAID_HOST)
    index_host: HostSeen | None = None
    report: IndexReport | None = None
    engines: list[EngineSeen] = field(default_factory=list)
    """Members, by id."""
    routers: list[RouterSeen] = field(default_factory=list)
    """That watch the index."""
    gateways: list[GatewaySeen] = field(default_factory=list)
    """That routers know, and that were named here."""
    links: list[LinkSeen] = field(default_factory=list)
    num_pairs: int = 0
    """Of engines that could send to each other; of a large mesh not all are tried."""
    cache: CacheSeen | None = None
    tried: bool = True
    """Transfers and the cache were tried, or would have been."""

    @property
    def hosts(self) -> list[HostSeen]:
        told = [self.own, self.index_host]
        told += [router.host for router in self.routers] + [engine.host for engine in self.engines]
        told += [gateway.host for gateway in self.gateways]
        return [each for each in told if each is not None]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong."""

    name: str
    """Stable, for scripts."""
    what: str
    where: str
    mend: str
    is_error: bool = True
    """It costs answers; else it may."""
