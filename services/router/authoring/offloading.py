"""Which requests are computed in another cluster: what ``prfaas`` remembers between them.

Owns the state of one strategy: a threshold for each other cluster, the lengths that came, what is on its way
over each link, and which links have just failed. The rules are services/clusters/; this gives them what the
mesh says. Decides, and acts never: a strategy asks, acts, and hands its sends in (:meth:`Offload.watch`).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from microserve.protocol.errors import PeerError
from microserve.protocol.smoothing import smoothed
from microserve.services.clusters.drift import LengthDrift
from microserve.services.clusters.threshold import Threshold
from microserve.services.router.authoring.action.grant import Sending
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.replanning import replanned
from microserve.services.router.authoring.view import EngineFacts, MeshView
from microserve.services.router.request.outcome import Outcome
from microserve.services.router.request.request import Request

KEY = "offload"
LOST_S = 5.0
"""A link over which a send has failed is left alone for so long, and then tried again."""
MAX_REMEMBERED = 4096
"""Requests that have gone across; the oldest are forgotten first."""
MOST_TOKENS = float(1 << 20)


class Way(NamedTuple):
    """What is to be done with one request."""

    home: str
    """Where it decodes."""
    cluster: str
    """Where its prompt is computed."""
    source: str
    """Where the prefix is that is copied there first."""
    copied: int
    """Tokens of it; 0: none is."""


@dataclass
class Crossing:
    """From one other cluster to ours."""

    rule: Threshold
    sent_nbytes: int = 0
    """Since ever."""
    best_bytes_per_s: float = 0.0
    """Of one put, as measured."""
    bytes_per_s: float = 0.0
    """Of late."""
    lost_until: float = 0.0
    due: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Of each send that is not done: when its prompt should be computed, and tokens that are sent."""
    seen_nbytes: int = 0
    seen_at: float = 0.0


class Offload:
    """Made by :func:`offload`."""

    def __init__(self, home: str, threshold: int, link_gbps: float) -> None:
        self.wanted = (home, threshold, link_gbps)
        self.lengths = LengthDrift()
        self.crossings: dict[str, Crossing] = {}
        self._crossed: OrderedDict[str, None] = OrderedDict()
        self._found: str | None = None
        """Home, where nobody has said it, as of the last look at the whole mesh: a request that is tried
        again does not see the engines that failed it, and home is where it was."""

    def choose(self, mesh: Mesh, request: Request) -> Way:
        """By the threshold of the other cluster that holds most of the prompt, or else has most engines.

        At home: where there is no other cluster, where its link has failed of late, and what has been across
        before, for then it has failed there.
        """
        clusters, held = mesh.clusters, mesh.prefix_by_cluster(request)
        home = self._home(mesh)
        others = [each for each in clusters if each != home]
        is_again = request.request_id in self._crossed
        if not (is_again or mesh.is_shadow or request.num_output_tokens):
            self.lengths.add(request.num_tokens - max(held.values(), default=0))
        if not others:
            return Way(home, home, home, 0)
        other = max(others, key=lambda each: (held.get(each, 0), len(mesh.engines(cluster=each)), each))
        crossing = self._crossing(other)
        here, there = held.get(home, 0), held.get(other, 0)
        if is_again or mesh.now < crossing.lost_until:
            return Way(home, home, home, 0)
        route = crossing.rule.route(request.num_tokens, here, there)
        mesh.note(
            "by threshold", cluster=other, uncached=route.uncached, threshold=round(crossing.rule.tokens)
        )
        cluster, source = (other, home) if route.is_remote else (home, other)
        if route.is_remote or route.copied:
            self._crossed[request.request_id] = None
            while len(self._crossed) > MAX_REMEMBERED:
                self._crossed.popitem(last=False)
        return Way(home, cluster, source, route.copied)

    def watch(self, mesh: Mesh, request: Request, source: EngineFacts, sending: Sending) -> None:
        """What a send over the link measures is kept; if it fails, the link is left alone for a while.

        One within a cluster, and one from home, which goes by a link of its own, changes nothing.
        """
        if source.cluster == self._home(mesh):
            return
        crossing, now = self._crossing(source.cluster), mesh.now
        computed = max(0, sending.end - mesh.prefix(request).get(source.id, 0))
        crossing.due[sending.name] = (
            now + mesh.predicted_ttft_s(source, computed),
            sending.end - sending.begin,
        )

        def ended(sending: Sending) -> None:
            crossing.due.pop(sending.name, None)
            if isinstance(sending.error, PeerError):
                crossing.lost_until = mesh.now + LOST_S
            if sending.sent is not None and sending.sent.nbytes > 0:
                crossing.sent_nbytes += sending.sent.nbytes
                if (seconds := sending.sent.timings.transfer_s) > 0.0:
                    rate = sending.sent.nbytes / seconds
                    crossing.bytes_per_s = smoothed(crossing.bytes_per_s, rate)
                    crossing.best_bytes_per_s = max(crossing.best_bytes_per_s, rate)

        sending.listen(ended)

    def forget(self, request: Request) -> None:
        """It has ended."""
        self._crossed.pop(request.request_id, None)

    def tick(self, mesh: MeshView, *, replan: bool) -> None:
        """A moment has passed: move thresholds, and with ``replan`` plan anew where lengths have drifted."""
        home, now = self._home(mesh), mesh.now
        present = set(mesh.clusters)
        for other in [each for each in self.crossings if each not in present]:
            del self.crossings[other]
        for crossing in self.crossings.values():
            passed_s, sent = now - crossing.seen_at, crossing.sent_nbytes - crossing.seen_nbytes
            crossing.seen_at, crossing.seen_nbytes = now, crossing.sent_nbytes
            late = sum(tokens for due, tokens in crossing.due.values() if due < now)
            rate = crossing.bytes_per_s or self._link_bytes_per_s(crossing)
            queue_s = late * mesh.kv_nbytes_per_token / rate if rate else 0.0
            able = self._link_bytes_per_s(crossing) * passed_s
            crossing.rule.tick(sent / able if able else 0.0, queue_s)
        if replan and self.crossings and self.lengths.is_due:
            other = max(self.crossings, key=lambda each: len(mesh.engines(cluster=each)))
            crossing = self.crossings[other]
            best = replanned(mesh, home, other, self.lengths, self._link_bytes_per_s(crossing))
            if best is not None:
                for each in self.crossings.values():
                    each.rule.aim(best)

    def _home(self, mesh: MeshView) -> str:
        """Where answers are decoded: as it was said, else where most engines have that label, else where most
        engines are."""
        if self.wanted[0]:
            return self.wanted[0]
        if isinstance(mesh, Mesh) and self._found is not None and self._found in mesh.clusters:
            return self._found

        def weight(cluster: str) -> tuple[int, int]:
            return len(mesh.engines("decode", strict=True, cluster=cluster)), len(
                mesh.engines(cluster=cluster)
            )

        self._found = max(mesh.clusters, key=weight, default="")
        return self._found

    def _crossing(self, other: str) -> Crossing:
        if other not in self.crossings:
            self.crossings[other] = Crossing(Threshold(float(self.wanted[1]), most=MOST_TOKENS))
        return self.crossings[other]

    def _link_bytes_per_s(self, crossing: Crossing) -> float:
        """What the link can carry: as it was said, else the best put that was seen; 0: nobody knows."""
        return self.wanted[2] * 1e9 / 8 or crossing.best_bytes_per_s


async def follow_links(
    mesh: MeshView, *, home: str, threshold: int, link_gbps: float, period_s: float, replan: bool
) -> None:
    """A plan: thresholds move every ``period_s``; with ``replan`` they are planned anew as lengths drift."""
    while True:
        await asyncio.sleep(period_s)
        offload(mesh, home=home, threshold=threshold, link_gbps=link_gbps).tick(mesh, replan=replan)


def forget_request(
    mesh: MeshView, request: Request, outcome: Outcome, *, home: str, threshold: int, link_gbps: float
) -> None:
    """An ``on_end``."""
    offload(mesh, home=home, threshold=threshold, link_gbps=link_gbps).forget(request)


def offload(mesh: MeshView, *, home: str, threshold: int, link_gbps: float) -> Offload:
    """This strategy's, kept in ``mesh.state``; with other values a new one. ``home``: the cluster of answers
    (empty: where most engines decode); ``threshold`` in tokens, to begin with; ``link_gbps``: what the link
    from another cluster carries (0: the best that was measured)."""
    kept = mesh.state.get(KEY)
    if not isinstance(kept, Offload) or kept.wanted != (home, threshold, link_gbps):
        kept = mesh.state[KEY] = Offload(home, threshold, link_gbps)
    return kept
