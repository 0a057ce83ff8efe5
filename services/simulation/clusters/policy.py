"""Who goes across: by a threshold that stays or goes with the link, everybody, nobody, or whoever finds less
work there."""

from __future__ import annotations

import math

from microserve.services.clusters.threshold import Threshold
from microserve.services.simulation.clusters.world import World


class ByThreshold:
    """More tokens than that."""

    def __init__(self, tokens: float) -> None:
        self.tokens = tokens

    def is_remote(self, tokens: float, world: World) -> bool:
        return tokens > self.tokens

    def tick(self, world: World, used: float, queue_s: float) -> None:
        pass


class ByLink(ByThreshold):
    """The rule that routers go by: the threshold rises while the link is scarce."""

    def __init__(self, rule: Threshold) -> None:
        super().__init__(rule.tokens)
        self.rule = rule

    def is_remote(self, tokens: float, world: World) -> bool:
        return self.rule.route(math.ceil(tokens), 0, 0).is_remote

    def tick(self, world: World, used: float, queue_s: float) -> None:
        self.rule.tick(used, queue_s)
        self.tokens = self.rule.tokens


class Everybody(ByThreshold):
    """Naive offload."""

    def __init__(self) -> None:
        super().__init__(0.0)


class Nobody(ByThreshold):
    def __init__(self) -> None:
        super().__init__(math.inf)


class ByLoad(ByThreshold):
    """Simple load balancing of unequal clusters: where fewer prompts are for each engine, however long."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def is_remote(self, tokens: float, world: World) -> bool:
        there, here = world.remote, world.local
        return (there.busy + len(there.waiting)) * here.count <= (here.busy + len(here.waiting)) * there.count
