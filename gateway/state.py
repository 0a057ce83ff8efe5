"""What the handlers of one gateway process share: the model, the routers, limits and counters.

Owns how many choices are in flight and whether anything new is taken; everything else in it is read only. The
process makes one and closes what is in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client.core import Metric

from microserve.gateway.api.parse import Shape
from microserve.gateway.grammar.checker import GrammarChecker
from microserve.gateway.helper.helper import Helpers
from microserve.gateway.http.errors import Forbidden
from microserve.gateway.http.exchange import BodyBudget
from microserve.gateway.kept.store import Store
from microserve.gateway.keys.key import ANONYMOUS, ApiKey
from microserve.gateway.keys.quota import Quotas
from microserve.gateway.keys.ring import KeyRing
from microserve.gateway.metrics import GatewayMetrics, Levels
from microserve.gateway.parsing.parsers import ModelParsers
from microserve.gateway.request.attributes import Attributes
from microserve.gateway.request.defaults import SamplingDefaults
from microserve.gateway.routers.client import RouterClient
from microserve.gateway.siblings import Siblings
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.gateway.view.view import View
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import Draining, MeshError, ModelNotFound, QueueFull
from microserve.protocol.logging.setup import current

LEAVE_FREE = 8
"""A key may have so many times as many streams as there is room for more."""


@dataclass(slots=True)
class GatewayState:
    """One per process."""

    model: str
    version: str
    created: int
    """When this process came up, in seconds since 1970: ``created`` of the model."""
    tokenizer: ModelTokenizer
    parsers: ModelParsers
    """How the model's thoughts and calls are read."""
    helpers: Helpers
    grammars: GrammarChecker
    bus: ZmqBus
    routers: RouterClient
    keys: KeyRing
    quotas: Quotas
    bodies: BodyBudget
    shape: Shape
    defaults: SamplingDefaults
    metrics: GatewayMetrics
    dtype: str
    """Of what the model computes in, as its setting says."""
    weights: str
    """``dtype``, or how they are rounded."""
    max_n: int
    max_choices: int
    """Choices in flight (``gateway.max_streams``); beyond it requests are refused."""
    request_timeout_s: float
    view: View
    """What operators see."""
    shared_prefix_cache: bool = False
    attributes: Attributes = field(default_factory=Attributes)
    """What strategies may be told of a request."""
    num_choices: int = 0
    """In flight; changed by :meth:`reserve` and :meth:`give_back` only."""
    store: Store | None = None
    """Of answers that clients may go on from; None: nothing is kept."""
    siblings: Siblings | None = None
    """Of a gateway of several workers."""
    draining: bool = False
    """Set by :meth:`drain`, for good."""

    def check_open(self) -> None:
        """Raises :class:`Draining` once the process is to end."""
        if self.draining:
            raise Draining("this gateway is shutting down", retry_after_s=1.0)

    def check_model(self, name: str | None, key: ApiKey = ANONYMOUS) -> None:
        """Raises :class:`ModelNotFound`, also for what ``key`` may not use: such a client is told of nothing
        that there is. None asks for whatever is served."""
        if key.models and (name or self.model) not in key.models:
            raise ModelNotFound(f"there is no model {(name or self.model)[:128]!r} for key {key.name!r}")
        if name is not None and name != self.model and name not in self.routers.known_adapters:
            raise ModelNotFound(f"the model {name[:128]!r} is not served here; {self.model!r} is")

    def check_some_model(self, key: ApiKey) -> None:
        """Raises :class:`ModelNotFound` for a key that may use nothing of what is served here."""
        if key.models and not {self.model, *self.routers.known_adapters}.intersection(key.models):
            self.check_model(None, key)

    def adapter_of(self, name: str | None) -> str:
        """The adapter that a checked ``model`` names; empty: it is the model itself."""
        return "" if name is None or name == self.model else name

    def strategy_for(self, name: str | None, key: ApiKey) -> str | None:
        """What serves a request that asks for the strategy ``name``, or for none.

        Raises :class:`Forbidden`."""
        if not key.strategies:
            return name
        if name is not None and name not in key.strategies:
            raise Forbidden(
                f"key {key.name!r} may not use the strategy {name!r}", field="x-microserve-strategy"
            )
        return name or key.strategies[0]

    def reserve(self, num_choices: int, key: ApiKey = ANONYMOUS) -> None:
        """Take room for choices until :meth:`give_back`. Raises :class:`QueueFull`: to a key that has most of
        the room already, before there is none."""
        own, room = self.quotas.of(key).num_streams, self.max_choices - self.num_choices
        if key.name and own > LEAVE_FREE * room:
            raise QueueFull(f"key {key.name!r} has {own} of {self.max_choices} streams", retry_after_s=1.0)
        if self.num_choices + num_choices > self.max_choices:
            raise QueueFull(f"{self.num_choices} of {self.max_choices} streams are in use", retry_after_s=1.0)
        self.num_choices += num_choices

    def give_back(self, num_choices: int) -> None:
        """The room of choices that are over."""
        self.num_choices -= num_choices

    def drain(self) -> None:
        """Take nothing new from now on."""
        self.draining = True

    def end_all(self, error: MeshError) -> None:
        """End every request that still runs, wherever it is."""
        self.bodies.end(error)
        self.helpers.end(error)
        self.routers.fail_all(error)

    async def families(self) -> Iterable[Metric]:
        """What is measured here, and by the other workers of this gateway."""
        if self.siblings is not None:
            return await self.siblings.families()
        return await self.own_families()

    async def own_families(self) -> Iterable[Metric]:
        return await self.metrics.families(self.levels())

    def levels(self) -> Levels:
        lines = current()
        load = self.routers.engines_load
        return Levels(
            num_choices=self.num_choices,
            mailbox_tokens=self.routers.num_waiting_tokens,
            bus_dropped=self.bus.dropped,
            bus_failed=self.bus.failed,
            routers_alive=sum(link.joined for link in self.routers.links),
            keys=dict(self.quotas.book.total),
            key_streams=self.quotas.streams(),
            log_dropped={} if lines is None else dict(lines.dropped) or {"none": 0},
            log_left_out=0 if lines is None else lines.left_out,
            engines_running=load.num_running,
            engines_waiting=load.num_waiting,
            kv_usage=load.kv_usage,
        )
