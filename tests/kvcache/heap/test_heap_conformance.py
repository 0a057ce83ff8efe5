from __future__ import annotations

import pytest

from microserve.kvcache.heap.mapped import MappedHeap
from tests.support.kvcache.heap.heap_conformance import HeapConformance
from tests.support.kvcache.heap.heap_factories import CROSSING, FACTORIES, INSTALLED, OTHERS, HeapFactory
from tests.support.kvcache.heap.heap_process_conformance import HeapProcessConformance
from tests.support.kvcache.kv_samples import make_layout


class TestHeap(HeapConformance):
    @pytest.fixture(params=INSTALLED)
    def factory(self, request: pytest.FixtureRequest) -> HeapFactory:
        return FACTORIES[request.param]()


class TestHeapProcess(HeapProcessConformance):
    @pytest.fixture(params=CROSSING)
    def factory_name(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)


@pytest.mark.parametrize("name", ["memory", "shm"])
def test_views_of_the_data_outlive_the_heap(name: str) -> None:
    heap = FACTORIES[name]().create(make_layout(), OTHERS)
    assert isinstance(heap, MappedHeap)
    view = heap.data
    view[:] = 5
    heap.close()

    assert view[-1] == 5
    view[0] = 6
