"""Events of two clusters: prompts on engines, KV on the link, answers in batches. One seed, one run.

A prompt takes the seconds of its length on one engine, first come, first served. One that is computed in the
other cluster leaves ``CHUNKS`` equal parts of its KV behind as its layers are done; they go over the link one
after the other, whoever they belong to. A first token is counted when the KV is where it decodes.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from microserve.services.clusters.lengths import Lengths
from microserve.services.clusters.profile import GBIT, ClusterProfile

CHUNKS = 8
TICK_S = 1.0


@dataclass(slots=True)
class Prompt:
    """One request."""

    at_s: float
    tokens: float
    is_remote: bool = False
    service_s: float = 0.0
    ready_s: float = -1.0
    """Its KV is where it decodes; -1: not yet."""

    @property
    def ttft_s(self) -> float:
        return self.ready_s - self.at_s


class Policy(Protocol):
    """Who goes across."""

    def is_remote(self, tokens: float, world: World) -> bool: ...

    def tick(self, world: World, used: float, queue_s: float) -> None:
        """``used``: share of the link since the last tick; ``queue_s``: what waits, at its rate of now."""


class Servers:
    """Equal ones behind one queue."""

    def __init__(self, world: World, count: int) -> None:
        self.count, self.busy = count, 0
        self.waiting: deque[tuple[float, Callable[[float], None], Callable[[], None]]] = deque()
        self._world = world

    def join(self, seconds: float, begun: Callable[[float], None], done: Callable[[], None]) -> None:
        """``begun`` is told when it starts, ``done`` that it has ended after ``seconds``."""
        self.waiting.append((seconds, begun, done))
        self._start()

    def _start(self) -> None:
        while self.waiting and self.busy < self.count:
            seconds, begun, done = self.waiting.popleft()
            self.busy += 1
            begun(self._world.now)
            self._world.at(self._world.now + seconds, partial(self._end, done))

    def _end(self, done: Callable[[], None]) -> None:
        self.busy -= 1
        done()
        self._start()


class Link:
    """First come, first served, at a rate that may step."""

    def __init__(self, steps: Sequence[tuple[float, float]]) -> None:
        """``steps``: from when on, and bytes a second; the first from 0."""
        self._steps = [*steps]
        self._free_s = 0.0
        self.queued_nbytes = 0.0
        self.sent_nbytes = 0.0

    def rate(self, at_s: float) -> float:
        return next(rate for begin, rate in reversed(self._steps) if begin <= at_s)

    def put(self, now: float, nbytes: float) -> float:
        """When the last of it will have arrived."""
        at_s = max(now, self._free_s)
        left = nbytes
        ends = [begin for begin, _ in self._steps if begin > at_s]
        for end in ends:
            able = (end - at_s) * self.rate(at_s)
            if able >= left:
                break
            left, at_s = left - able, end
        self._free_s = at_s + left / self.rate(at_s)
        self.queued_nbytes += nbytes
        return self._free_s

    def arrived(self, nbytes: float) -> None:
        self.queued_nbytes -= nbytes
        self.sent_nbytes += nbytes


@dataclass
class Look:
    """What was there at one tick."""

    at_s: float
    waiting: int
    """Prompts that no engine computes yet."""
    link_nbytes: float
    """Computed and not yet here."""
    answers_waiting: int
    threshold: float


@dataclass
class World:
    """``run`` it once."""

    profile: ClusterProfile
    policy: Policy
    num_prefill: int
    """Of the local engines; the others decode."""
    link_gbps: Sequence[tuple[float, float]] = ()
    """From when on, and Gbit/s; empty: the profile's, always."""
    now: float = 0.0
    prompts: list[Prompt] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _number: int = 0

    def __post_init__(self) -> None:
        steps = self.link_gbps or [(0.0, self.profile.link_gbps)]
        self.link = Link([(at_s, gbps * GBIT) for at_s, gbps in steps])
        self.remote = Servers(self, self.profile.remote.instances)
        self.local = Servers(self, self.num_prefill)
        places = (self.profile.local.instances - self.num_prefill) * self.profile.local.places
        self.decode = Servers(self, places)

    def at(self, at_s: float, event: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, event))

    def run(self, lengths: Lengths, rate: float, seconds: float, seed: int = 0) -> None:
        """``rate`` prompts a second come, by lot, for so long; what is left then is left."""
        rng = np.random.default_rng(seed)
        gaps = rng.exponential(1.0 / rate, int(rate * seconds * 1.2) + 100)
        times = np.cumsum(gaps)
        times = times[times < seconds]
        tokens = lengths.drawn(len(times), rng)
        self.prompts = [Prompt(float(t), float(n)) for t, n in zip(times, tokens, strict=True)]
        there, here = self.profile.remote.prefill_s.at(tokens), self.profile.local.prefill_s.at(tokens)
        nbytes = self.profile.kv_nbytes.at(tokens)
        for prompt, far_s, near_s, weight in zip(self.prompts, there, here, nbytes, strict=True):
            come = partial(self._come, prompt, float(far_s), float(near_s), float(weight))
            self.at(prompt.at_s, come)
        self.at(TICK_S, lambda: self._tick(0.0))
        while self._events and self._events[0][0] <= seconds:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def _come(self, prompt: Prompt, far_s: float, near_s: float, nbytes: float) -> None:
        prompt.is_remote = self.policy.is_remote(prompt.tokens, self)
        if not prompt.is_remote:
            prompt.service_s = near_s
            self.local.join(near_s, lambda _: None, lambda: self._ready(prompt))
            return
        prompt.service_s = far_s

        def begun(at_s: float) -> None:
            for number in range(1, CHUNKS + 1):
                is_last = number == CHUNKS
                self.at(at_s + far_s * number / CHUNKS, partial(send, is_last))

        def send(is_last: bool) -> None:
            part = nbytes / CHUNKS
            self.at(self.link.put(self.now, part), lambda: arrive(part, is_last))

        def arrive(part: float, is_last: bool) -> None:
            self.link.arrived(part)
            if is_last:
                self._ready(prompt)

        self.remote.join(far_s, begun, lambda: None)

    def _ready(self, prompt: Prompt) -> None:
        prompt.ready_s = self.now
        local = self.profile.local
        self.decode.join(local.step_s * self.profile.output_tokens, lambda _: None, lambda: None)

    def _tick(self, sent_before: float) -> None:
        link, rate = self.link, self.link.rate(self.now)
        used = (link.sent_nbytes - sent_before) / (rate * TICK_S)
        self.policy.tick(self, used, link.queued_nbytes / rate)
        waiting = len(self.remote.waiting) + len(self.local.waiting)
        threshold = getattr(self.policy, "tokens", 0.0)
        self.looks.append(Look(self.now, waiting, link.queued_nbytes, len(self.decode.waiting), threshold))
        sent = link.sent_nbytes
        self.at(self.now + TICK_S, lambda: self._tick(sent))
