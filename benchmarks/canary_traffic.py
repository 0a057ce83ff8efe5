"""Requests as a mesh has them, and what routers say of them: for canary.py, and for tests of comparisons.

Prompts are lognormal, and for half of them some engine holds most: so times have two humps. Beside that they
scatter as those of the simulation do (four engines, Mooncake's conversation trace at 1 request/s, shortest
queue and longest prefix: the logarithm's standard deviation is 1.5, and 0.33 to 0.36 beside what is known of
a request; its kurtosis is 11 to 17).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from microserve.protocol.messages.engine import Usage
from microserve.protocol.messages.strategy.scores import Side
from microserve.services.router.rollout.sums import Sums, Timing


@dataclass(frozen=True, slots=True)
class Traffic:
    """What two versions are compared on."""

    scatter: float = 0.33
    """Standard deviation, about, of the logarithm of a TTFT beside what is known of its request."""
    share: float = 0.5
    """Of the requests that the canary has."""
    factor: float = 1.0
    """The canary's time to first token, over the stable version's."""
    failing: tuple[float, float] = (0.0, 0.0)
    """Of the canary's requests, and of the others', those that fail."""
    is_known: bool = True
    """What is known of a request goes into the comparison."""


class Comparison:
    """One canary beside one stable version, request by request."""

    def __init__(self, traffic: Traffic, seed: int) -> None:
        self._traffic = traffic
        self._rng = random.Random(seed)
        self._canary, self._stable = Sums(), Sums()

    def step(self) -> tuple[Side, Side]:
        """One request more; what is known of the canary and of the other then."""
        rng, traffic = self._rng, self._traffic
        is_canary = rng.random() < traffic.share
        num_prompt = max(16, round(rng.lognormvariate(8.5, 1.2)))
        num_unheld = round(num_prompt * (0.1 if rng.random() < 0.5 else 1.0))
        num_output = max(2, round(rng.lognormvariate(5.0, 0.8)))
        ttft_s = (0.005 + num_unheld / 20_000) * self._luck() * (traffic.factor if is_canary else 1.0)
        tpot_s = 0.01 * rng.lognormvariate(0.0, 0.2)
        jct_s = ttft_s + (num_output - 1) * tpot_s
        failed = rng.random() < traffic.failing[0 if is_canary else 1]
        timing = Timing() if failed else Timing(math.log(ttft_s), math.log(tpot_s), math.log(jct_s))
        side = self._canary if is_canary else self._stable
        usage = Usage(num_prompt, output_tokens=num_output) if traffic.is_known else Usage()
        side.add(failed, timing, num_unheld if traffic.is_known else 0, usage)
        return self._canary.told(), self._stable.told()

    def _luck(self) -> float:
        """Most times scatter little. One in seven has waited for others, some of these for long."""
        rng, scatter = self._rng, self._traffic.scatter
        waited = rng.expovariate(1.0) * 1.6 * scatter if rng.random() < 1 / 7 else 0.0
        return rng.lognormvariate(0.0, scatter / 3) * math.exp(waited)

    def steps(self, count: int) -> Iterator[tuple[Side, Side]]:
        for _ in range(count):
            yield self.step()
