"""Where one request's prompt is computed, and how the threshold goes as the link between clusters goes.

While the link is *abundant* a cache of either cluster counts, for it can be copied; while it is *scarce* each
cluster is judged by its own. The threshold is raised at each tick that finds the link too full, and goes back
towards the planned one bit by bit, so that no step of it sends a herd across.

Source: PrfaaS, arXiv 2604.15039, section 3.4: the two branches. It names no bounds and no steps: those here
are ours.
"""

from __future__ import annotations

import math
from typing import NamedTuple

LEAST_TOKENS = 64.0
"""A threshold of 0 (all go) could not be raised by a share of itself."""


class Route(NamedTuple):
    """What is to be done with one prompt."""

    is_remote: bool
    """Computed in the other cluster."""
    uncached: int
    """Tokens that were held against the threshold."""
    work: int
    """Tokens that the chosen cluster computes."""
    copied: int
    """Tokens of a prefix that are copied to the chosen cluster from the other one first; 0: none."""


class Threshold:
    """State of one link, in the direction towards the local cluster."""

    def __init__(
        self,
        best: float,
        *,
        high: float = 0.85,
        low: float = 0.6,
        queue_high_s: float = 1.0,
        raised: float = 0.1,
        relaxed: float = 0.01,
        most: float = math.inf,
    ) -> None:
        """``best``: what is planned, in tokens. The link becomes scarce when the share ``high`` of it is in
        use, or what waits for it takes ``queue_high_s`` and more, and abundant again below ``low`` and half
        of those seconds. ``raised``, ``relaxed``: shares of the threshold, a tick; ``most`` bounds it."""
        self.best = self.tokens = best
        self.high, self.low, self.queue_high_s = high, low, queue_high_s
        self.raised, self.relaxed, self.most = raised, relaxed, most
        self.is_scarce = False
        self._queue_s = 0.0

    def tick(self, used: float, queue_s: float) -> None:
        """``used``: share of the link since the last tick; ``queue_s``: seconds that what waits will take."""
        shrinks, self._queue_s = queue_s < self._queue_s, queue_s
        if used >= self.high or queue_s >= self.queue_high_s:
            self.is_scarce = True
            if not shrinks:  # else what was done is enough, and more of it would fill the local engines
                raised = max(self.tokens, LEAST_TOKENS) * (1 + self.raised)
                self.tokens = min(raised, max(self.most, self.best))
            return
        if used < self.low and queue_s < self.queue_high_s / 2:
            self.is_scarce = False
        if not self.is_scarce:
            step = max(self.tokens, LEAST_TOKENS) * self.relaxed
            self.tokens += min(max(self.best - self.tokens, -step), step)

    def aim(self, best: float) -> None:
        """Another plan: the threshold goes there as it goes back after the link was full."""
        self.best = best

    def route(self, total: int, local: int, remote: int) -> Route:
        """``total``: tokens of the prompt; ``local``, ``remote``: of those, cached in each cluster."""
        uncached = total - (local if self.is_scarce else max(local, remote))
        is_remote = uncached > self.tokens
        own, other = (remote, local) if is_remote else (local, remote)
        copied = 0 if self.is_scarce or other <= own else other
        return Route(is_remote, uncached, total - max(own, copied), copied)
