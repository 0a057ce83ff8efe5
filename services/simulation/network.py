"""Messages between simulated processes: when they arrive, in which order, how often, or not at all.

Owns connections, latency and every fault that a network can have; all by one random generator, so a seed
replays. A connection behaves as ZeroMQ's over TCP: in order, reconnecting by itself under the same peer id,
losing what was on its way when it broke. ``Weather`` adds what TCP would not do, because nobody should have
to trust it. Knows frames, not messages.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from microserve.services.simulation.loop import Process, VirtualLoop

MIN_LATENCY_S, MAX_LATENCY_S = 5e-5, 5e-4
RECONNECT_S = 0.05
"""Between two attempts to connect (ZeroMQ's default is 0.1 s)."""
HIGH_WATER_MARK = 10_000

Deliver = Callable[[list[bytes]], None]


@dataclass
class Weather:
    """Chances a message; 0 everywhere is a network without faults."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay: float = 0.0
    max_delay_s: float = 0.3


class Endpoint:
    """One end of a connection: which process reads there, and how."""

    __slots__ = ("deliver", "due", "is_open", "process", "salt")

    def __init__(self, process: Process, deliver: Deliver) -> None:
        self.process = process
        self.deliver = deliver
        self.is_open = True
        self.due = 0.0
        """Arrival of the last message on its way here: the next one arrives later."""
        self.salt: int | None = None
        """Of the way that leads here, in a network where a message's latency is a function of that."""


class Network:
    """Carries frames from one process to an endpoint of another."""

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.weather = Weather()
        self.faults: Counter[str] = Counter()
        """What was done to messages."""
        self.num_carried = 0
        self._blocked: dict[tuple[str, str], bool] = {}
        """(from, to) -> are messages lost, rather than held until the way is free?"""
        self._held: list[tuple[tuple[str, str], Endpoint, list[bytes]]] = []

    # --- partitions --------------------------------------------------------------------------------

    def block(self, source: str, target: str, *, lossy: bool) -> None:
        """One way only: nothing passes from ``source`` to ``target`` until :meth:`unblock`."""
        self._blocked[source, target] = lossy

    def unblock(self, source: str, target: str) -> None:
        self._blocked.pop((source, target), None)
        held, self._held = self._held, []
        for way, endpoint, frames in held:
            if way == (source, target):
                self._schedule(endpoint, frames, self.latency())
            else:
                self._held.append((way, endpoint, frames))

    def unblock_all(self) -> None:
        for source, target in list(self._blocked):
            self.unblock(source, target)

    def is_blocked(self, source: str, target: str) -> bool:
        return (source, target) in self._blocked

    # --- messages ----------------------------------------------------------------------------------

    def latency(self) -> float:
        return MIN_LATENCY_S + (MAX_LATENCY_S - MIN_LATENCY_S) * self.rng.random()

    def carry(self, source: Process, endpoint: Endpoint, frames: Sequence[bytes]) -> None:
        """Send frames on their way. What the weather does is counted."""
        self.num_carried += 1
        copy = list(frames)
        if self._blocked:
            way = source.name, endpoint.process.name
            lossy = self._blocked.get(way)
            if lossy is not None:
                self.faults["partitioned"] += 1
                if not lossy:
                    self._held.append((way, endpoint, copy))
                return
        weather, rng, delay_s = self.weather, self.rng, self.latency()
        if weather.drop and rng.random() < weather.drop:
            self.faults["drop"] += 1
            return
        if weather.delay and rng.random() < weather.delay:
            self.faults["delay"] += 1
            delay_s += rng.uniform(0.0, weather.max_delay_s)
        if weather.duplicate and rng.random() < weather.duplicate:
            self.faults["duplicate"] += 1
            self._schedule(endpoint, list(copy), delay_s + rng.uniform(0.0, weather.max_delay_s), late=True)
        if weather.reorder and rng.random() < weather.reorder:
            self.faults["reorder"] += 1
            self._schedule(endpoint, copy, delay_s + rng.uniform(0.0, 0.01), late=True)
            return
        self._schedule(endpoint, copy, delay_s)

    def after(self, endpoint: Endpoint, delay_s: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` in the endpoint's process, behind what is on its way there."""
        due = max(self.loop.now + delay_s, endpoint.due)
        self.loop.arrive(due, endpoint.process, callback)

    def _schedule(
        self, endpoint: Endpoint, frames: list[bytes], delay_s: float, *, late: bool = False
    ) -> None:
        """``late``: others may overtake it."""
        due = self.loop.now + delay_s
        if not late:
            endpoint.due = due = max(due, endpoint.due)
        self.loop.arrive(due, endpoint.process, self._arrive, endpoint, frames)

    def _arrive(self, endpoint: Endpoint, frames: list[bytes]) -> None:
        if endpoint.is_open:
            endpoint.deliver(frames)


class CalmNetwork(Network):
    """Without a common lot, as long as it has no faults: how long a message takes depends on its way and its
    moment alone. So one message more or less, a sign of life say, changes nothing for the others."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, seed: int) -> None:
        super().__init__(loop, rng)
        self._seed = seed

    def carry(self, source: Process, endpoint: Endpoint, frames: Sequence[bytes]) -> None:
        weather = self.weather
        if self._blocked or weather.drop or weather.delay or weather.duplicate or weather.reorder:
            super().carry(source, endpoint, frames)
            return
        self.num_carried += 1
        salt, loop = endpoint.salt, self.loop
        if salt is None:
            way = f"{self._seed} {source.name} {endpoint.process.name}"
            salt = endpoint.salt = zlib.crc32(way.encode())
        now = loop.now
        lot = hash((salt, int(now * 1e8))) & 0xFFFF_FFFF  # nothing goes by the last bits of a time
        due = now + (MIN_LATENCY_S + (MAX_LATENCY_S - MIN_LATENCY_S) * (lot / 0x1_0000_0000))
        endpoint.due = due = max(due, endpoint.due)
        loop.arrive(due, endpoint.process, self._arrive, endpoint, frames)
