"""The heaps under test. A new heap adds a factory here, and passes the conformance suites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.memory import MemoryHeap, MemoryRegistry
from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout

NUM_SLOTS = 3
MINE, THEIRS, OTHERS = 11, 22, 33
"""Incarnations."""


class HeapFactory(ABC):
    crosses_processes: ClassVar[bool]

    @abstractmethod
    def create(self, layout: KvLayout, incarnation: int) -> Heap: ...


class MemoryFactory(HeapFactory):
    crosses_processes = False

    def __init__(self) -> None:
        self.registry = MemoryRegistry()

    def create(self, layout: KvLayout, incarnation: int) -> Heap:
        return MemoryHeap(layout, incarnation=incarnation, registry=self.registry, num_slots=NUM_SLOTS)


class ShmFactory(HeapFactory):
    crosses_processes = True

    def create(self, layout: KvLayout, incarnation: int) -> Heap:
        return ShmHeap(layout, incarnation=incarnation, num_slots=NUM_SLOTS)


FACTORIES: dict[str, Callable[[], HeapFactory]] = {"memory": MemoryFactory, "shm": ShmFactory}
CROSSING = [name for name, factory in FACTORIES.items() if factory().crosses_processes]
