"""A heap whose one-sided writes take virtual time and can go wrong: torn, delayed, doubled, lost, bent.

Owns the faults between a writer and its receiver's memory, and tells the witness of every word. Each fault is
one that the design claims to survive: a write is torn by its writer's death or freeze in the middle, a signal
is lost or comes twice, bytes change on the way (found by ``kvcache.checksums``). What the contract of a heap
rules out (a write that lands after its writer has let the lane go) is not made here: tests plant it to see
that the harness notices.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.heap import Copies, Copy
from microserve.kvcache.heap.local import MemoryHeap, MemoryPeerHeap, MemoryRegistry
from microserve.kvcache.heap.mapped import require_same_kv
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.kv.grant import HeapAddress
from microserve.services.simulation.engine.witness import Lane, Witness


@dataclass
class WriteWeather:
    """Chances a write, or a signal."""

    torn: float = 0.0
    """A pause in the middle of a write: others see half of it, and its writer may die there."""
    pause: float = 0.0
    """A pause before a signal: data is here, the count is not."""
    max_pause_s: float = 0.05
    lost_write: float = 0.0
    doubled_write: float = 0.0
    lost_signal: float = 0.0
    doubled_signal: float = 0.0
    bent: float = 0.0
    """One bit of a write changes on the way."""


class WriteFaults:
    """One engine's writes: what happens to them, and how often it has."""

    def __init__(self, rng: random.Random, sleep: Callable[[float], None]) -> None:
        self.rng = rng
        self.sleep = sleep
        self.weather = WriteWeather()
        self.snag: Callable[[], None] | None = None
        """Called once, in the middle of the next write."""
        self.counts: Counter[str] = Counter()
        self.exhausted = False
        """The engine has no descriptor for a peer's heap."""

    def happens(self, name: str, chance: float) -> bool:
        if chance and self.rng.random() < chance:
            self.counts[name] += 1
            return True
        return False

    def pause_in_write(self) -> None:
        snag, self.snag = self.snag, None
        if snag is not None:
            self.counts["snag"] += 1
            snag()
        self.pause()

    def pause(self) -> None:
        self.sleep(self.rng.uniform(0.0, self.weather.max_pause_s))


class FaultyHeap(MemoryHeap):
    def __init__(
        self,
        layout: KvLayout,
        *,
        incarnation: int,
        registry: MemoryRegistry,
        num_slots: int,
        faults: WriteFaults,
        witness: Witness,
        ring: Callable[[], None],
    ) -> None:
        """``ring`` is called when somebody has written here."""
        super().__init__(layout, incarnation=incarnation, registry=registry, num_slots=num_slots)
        self.ring = ring
        self._faults = faults
        self._witness = witness

    def store(self, word: int, value: int) -> None:
        super().store(word, value)
        self._witness.stored(self.address.incarnation, self.words, word, value)

    def attach(self, address: HeapAddress) -> MemoryPeerHeap:
        if self._faults.exhausted:
            raise OSError(errno.EMFILE, "no mapping: Too many open files")
        owner = self._registry._find(address)
        require_same_kv(self.layout, owner.layout)
        ring = owner.ring if isinstance(owner, FaultyHeap) else self.ring
        return FaultyPeerHeap(self, owner, self._registry, self._faults, self._witness, ring)

    def close(self) -> None:
        self._witness.leave(self.address.incarnation)
        super().close()


class FaultyPeerHeap(MemoryPeerHeap):
    def __init__(
        self,
        writer: MemoryHeap,
        owner: MemoryHeap,
        registry: MemoryRegistry,
        faults: WriteFaults,
        witness: Witness,
        ring: Callable[[], None],
    ) -> None:
        super().__init__(writer, owner, registry)
        self._faults = faults
        self._witness = witness
        self._ring = ring

    def put(self, copies: Copies, source_shift: int = 0, target_shift: int = 0) -> None:
        put = super().put
        self._write(lambda some: put(some, source_shift, target_shift), copies, target_shift)

    def put_payload(self, payload: NDArray[np.uint8], copies: Copies, target_shift: int = 0) -> None:
        put = super().put_payload
        self._faults.counts["payload"] += 1
        self._write(lambda some: put(payload, some, target_shift), copies, target_shift)

    def _write(self, put: Callable[[Copies], None], copies: Copies, target_shift: int) -> None:
        faults, weather = self._faults, self._faults.weather
        if self._is_spoilt("lost write", weather.lost_write):
            return
        if faults.snag is None and not faults.happens("torn write", weather.torn):
            put(copies)
        else:
            first, second = _halves(copies)
            put(first)
            faults.pause_in_write()
            put(second)
        if faults.happens("doubled write", weather.doubled_write):
            faults.pause()
            put(copies)
        if copies.slices and self._is_spoilt("bent write", weather.bent):
            place = faults.rng.choice(copies.slices)[0]
            at = target_shift + faults.rng.randrange(place.start, place.stop)
            self._target[at] ^= 1 << faults.rng.randrange(8)
        if faults.happens("late signal", weather.pause):
            faults.pause()

    def signal(self, word: int, value: int) -> None:
        faults, weather = self._faults, self._faults.weather
        if self._is_spoilt("lost signal", weather.lost_signal):
            return
        super().signal(word, value)
        if faults.happens("doubled signal", weather.doubled_signal):
            super().signal(word, value)
        self._ring()
        self._witness.signalled(self._writer, self.address.incarnation, self.words, word, value)

    def signal_each(self, words: NDArray[np.int64], value: int) -> None:
        if not self._is_spoilt("lost signal", self._faults.weather.lost_signal):
            super().signal_each(words, value)
            self._witness.tagged(self._writer, value)

    def let_go(self, slot: int, lane: int) -> None:
        if (slot, lane) in self._held:
            state = self.read(self.words.state(slot))
            self._witness.letting_go(self._writer, Lane(self.address.incarnation, slot, lane), state)
        super().let_go(slot, lane)
        self._ring()

    def _is_spoilt(self, name: str, chance: float) -> bool:
        """Does a fault happen that the receiver cannot but refute?"""
        happens = self._faults.happens(name, chance)
        if happens:
            self._witness.spoilt(self.address.incarnation)
        return happens


def _halves(copies: Copies) -> tuple[Copies, Copies]:
    """Every copy cut in two: a write torn in each of its places."""
    first, second = [], []
    for source, target, nbytes in copies.copies:
        half = nbytes // 2
        first.append(Copy(source, target, half))
        second.append(Copy(source + half, target + half, nbytes - half))
    return Copies(first), Copies(second)
