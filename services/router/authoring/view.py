"""The mesh without a request: who is there, how busy, how fast. What a plan reads, and a strategy too.

Owns no state of its own and sends nothing; actions belong to a request (action/engine.py).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

from microserve.protocol.errors import StrategyError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.engine_info import PREP_RECV, REMOTE_SEND
from microserve.protocol.messages.kv.geometry import difference
from microserve.protocol.messages.strategy.control import fault_of_labels
from microserve.services.router.authoring.holding import Queues
from microserve.services.router.engines.connection import Connection
from microserve.services.router.engines.load import Load, LoadBook
from microserve.services.router.engines.prediction import engine_view, predicted_ttft_s

READS_ONLY = ("EngineFacts.", "MeshView.")
"""Where a strategy that hangs may be broken off (../oversight/cut.py)."""


class StrategyState(dict[str, Any]):
    """What a strategy remembers between requests, the labels that it has given, and whom it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = OwnLabels()
        self.held = Queues()


class EngineFacts:
    """One engine, to look at. Equal handles are the same engine."""

    def __init__(self, connection: Connection, own_labels: OwnLabels) -> None:
        self._connection = connection
        self._own_labels = own_labels

    @property
    def id(self) -> str:
        """Its name in the mesh, in this life and the next: what a strategy may keep."""
        return self._connection.engine_id

    @property
    def labels(self) -> Sequence[str]:
        """The strategy's own if it has given any, else the operator's, else those that it announces."""
        return self._own_labels.of(self.id, self._connection.labels)

    @property
    def cluster(self) -> str:
        """Where it stands, by its own word (``engine.cluster``); engines without one are of one together."""
        return self.info.cluster

    @property
    def shared_labels(self) -> Sequence[str]:
        """The same without the strategy's own."""
        return self._connection.labels

    @property
    def info(self) -> wire.EngineInfo:
        """What it is; the same all its life."""
        return self._connection.info

    @property
    def reported(self) -> wire.EngineLoad:
        """What the engine said of itself in its last heartbeat."""
        return self._connection.load

    @property
    def reported_age_s(self) -> float:
        """Seconds since that came."""
        return asyncio.get_running_loop().time() - self._connection.load_at

    def can(self, *abilities: str) -> bool:
        """Does it all of these? ``prep_recv``, ``remote_send``, ``commit``, ``first_token``, ``early_start``,
        ``prompt_logprobs``, ``grammar``, ``lora``: engines of one mesh may differ in them (docs/engines.md).
        """
        return all(map(self.info.does, abilities))

    def keeps_kv_of(self, source: EngineFacts) -> bool:
        """Would KV of ``source`` become prefix cache here? Not where one of the two exchanges none, where
        theirs differ in shape, one is too old to say of which weights, or a self-check found that answers
        differ; an exact numerics class keeps no other's."""
        own, other = self.info, source.info
        if own.is_stranger(other) or self.id in source._connection.barred:
            return False
        if not (own.does(PREP_RECV) and other.does(REMOTE_SEND)) or difference(own.geometry, other.geometry):
            return False
        return not own.numerics.is_exact or own.numerics == other.numerics

    def split_at(self, position: int) -> int:
        """The last place up to ``position`` where a send from here may begin, or one may end before the
        grant's end: of engines that send whole blocks only, a block's edge."""
        return position - position % self.info.split_tokens

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EngineFacts) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"Engine({self.id!r})"


class MeshView:
    """Membership, load and links as of each call."""

    def __init__(
        self,
        connections: Callable[[], Sequence[Connection]],
        book: LoadBook,
        rng: random.Random,
        state: StrategyState,
        *,
        is_shadow: bool = False,
    ) -> None:
        """``connections`` lists the engines that may take new work."""
        self.is_shadow = is_shadow
        """Nothing is carried out: the strategy only says what it would do. Do not learn from what it sees."""
        self.state = state
        """This strategy's own, in this router: the same object for every request and for the plan. Lives as
        long as the strategy; keep it bounded. Code between two ``await`` has it alone."""
        self.rng = rng
        """The router's: with a seeded router, draws from it can be repeated."""
        self._connections = connections
        self._book = book

    @property
    def now(self) -> float:
        """Seconds by the router's clock, which only goes forward. The one to use: in a simulation it is the
        simulated time, so that runs can be repeated."""
        return asyncio.get_running_loop().time()

    def engines(
        self, label: str | None = None, *, strict: bool = False, cluster: str | None = None
    ) -> Sequence[EngineFacts]:
        """Engines with ``label``; one without any label serves every label. If no engine has it: all.

        Labels are preferences and not roles, so an empty list means that nobody is alive. With ``strict``
        they are roles: those that bear the label themselves, or none. ``cluster``: of all this, in that one.
        """
        found = self._fit(label, strict, cluster)
        return [EngineFacts(connection, self.state.labels) for connection in found]

    @property
    def clusters(self) -> Sequence[str]:
        """Names of those in which engines stand, in order; empty, if it is among them: of engines without."""
        return sorted({connection.info.cluster for connection in self._connections()})

    def label(self, engine: EngineFacts, *labels: str) -> None:
        """Give an engine other labels for this strategy's picks in this router, from the next one on.

        They hold until they are given anew, or until an operator labels the engine. Without any: what the
        mesh says counts again. Raises ``StrategyError`` for what cannot be a label.
        """
        self.state.labels.give(engine.id, labels, engine.shared_labels)

    def load(self, engine: EngineFacts) -> Load:
        """Work on the engine now: our own book and its last report, whichever is more."""
        return self._book.load(engine.id, engine.reported)

    def link(self, source: EngineFacts, target: EngineFacts) -> float:
        """Measured goodput of puts from ``source`` to ``target``, bytes a second; 0: not measured. By this
        router's own sends, else of the network between them as ``source`` has measured it."""
        return self._book.links.goodput(source.id, target.id) or source.reported.goodput_to(target.id)

    @property
    def kv_nbytes_per_token(self) -> float:
        """Bytes that one token's KV is on a link; 0 before the first send."""
        return self._book.links.kv_nbytes_per_token

    def transfer_s(self, source: EngineFacts, target: EngineFacts, num_tokens: int) -> float:
        """Seconds that a put of ``num_tokens`` takes; 0 where the link has not been measured."""
        goodput = self.link(source, target)
        return num_tokens * self.kv_nbytes_per_token / goodput if goodput else 0.0

    def predicted_ttft_s(self, engine: EngineFacts, num_tokens: int) -> float:
        """Seconds until the engine's first token for a prompt of which it must compute ``num_tokens``: as
        admission predicts it (prediction.py). 0 where nothing has been measured."""
        now = self.now
        return predicted_ttft_s(engine_view(engine._connection, self._book, now), num_tokens)

    def cluster_link(self, source: str, target: str) -> float:
        """The best goodput that was measured from an engine of cluster ``source`` to one of ``target``, bytes
        a second; 0: not measured."""
        return max(
            (self.link(a, b) for a in self.engines(cluster=source) for b in self.engines(cluster=target)),
            default=0.0,
        )

    def _fit(
        self, label: str | None, strict: bool = False, cluster: str | None = None
    ) -> Sequence[Connection]:
        return self._labelled(within(self._connections(), cluster), label, strict)

    def _labelled(
        self, everyone: Sequence[Connection], label: str | None, strict: bool
    ) -> Sequence[Connection]:
        if label is None:
            return everyone
        own = self.state.labels
        if strict:
            return [c for c in everyone if label in own.of(c.engine_id, c.labels)]
        if own:
            fit = [c for c in everyone if not (has := own.of(c.engine_id, c.labels)) or label in has]
        else:
            fit = [c for c in everyone if not (has := c.labels) or label in has]
        return fit or everyone


def within(connections: Sequence[Connection], cluster: str | None) -> Sequence[Connection]:
    """Those of engines in that cluster; None: all."""
    if cluster is None:
        return connections
    return [connection for connection in connections if connection.info.cluster == cluster]


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
