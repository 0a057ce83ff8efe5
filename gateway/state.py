"""What the handlers of one gateway process share: the model, the routers, limits and counters.

Plain data; the application makes one and closes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from microserve.gateway.http.auth import KeyRing
from microserve.gateway.http.exchange import BodyBudget
from microserve.gateway.metrics import GatewayMetrics, Levels
from microserve.gateway.routers.client import RouterClient
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import Draining, MeshError, ModelNotFound, QueueFull


@dataclass(slots=True)
class GatewayState:
    """One per process."""

    model: str
    version: str
    created: int
    """When this process came up, in seconds since 1970: ``created`` of the model."""
    tokenizer: ModelTokenizer
    bus: ZmqBus
    routers: RouterClient
    keys: KeyRing
    bodies: BodyBudget
    metrics: GatewayMetrics
    max_n: int
    max_sequences: int
    """Sequences in flight; beyond it requests are refused."""
    request_timeout_s: float
    num_sequences: int = 0
    draining: bool = False

    def check_open(self) -> None:
        """Raises :class:`Draining` once the process is to end."""
        if self.draining:
            raise Draining("this gateway is shutting down", retry_after_s=1.0)

    def check_model(self, name: str | None) -> None:
        """Raises :class:`ModelNotFound`; None asks for whatever is served."""
        if name is not None and name != self.model:
            raise ModelNotFound(f"the model {name[:128]!r} is not served here; {self.model!r} is")

    def reserve(self, num_sequences: int) -> None:
        """Take room for sequences; ``num_sequences`` is given back by hand. Raises :class:`QueueFull`."""
        if self.num_sequences + num_sequences > self.max_sequences:
            raise QueueFull(
                f"{self.num_sequences} of {self.max_sequences} streams are in use", retry_after_s=1.0
            )
        self.num_sequences += num_sequences

    def end_all(self, error: MeshError) -> None:
        """End every request that still runs."""
        self.routers.fail_all(error)

    def levels(self) -> Levels:
        return Levels(
            num_sequences=self.num_sequences,
            mailbox_tokens=self.routers.num_waiting_tokens,
            bus_dropped=self.bus.dropped,
            bus_failed=self.bus.failed,
            routers_alive=sum(link.joined for link in self.routers.links),
        )
