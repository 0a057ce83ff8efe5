"""A heap with a door of TCP, and the one of who writes through it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from microserve.kvcache.heap.doors.host import HostHeap
from tests.support.kvcache.heap.door_heaps import make_heap
from tests.support.kvcache.heap.heap_factories import MINE, THEIRS


@pytest.fixture
def heap() -> Iterator[HostHeap]:
    with make_heap(MINE) as heap:
        yield heap


@pytest.fixture
def writer() -> Iterator[HostHeap]:
    with make_heap(THEIRS) as writer:
        yield writer
