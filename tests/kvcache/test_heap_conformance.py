from __future__ import annotations

import pytest

from tests.kvcache.heap_conformance import HeapConformance
from tests.kvcache.heap_factories import CROSSING, FACTORIES, HeapFactory
from tests.kvcache.heap_process_conformance import HeapProcessConformance


class TestHeap(HeapConformance):
    @pytest.fixture(params=FACTORIES)
    def factory(self, request: pytest.FixtureRequest) -> HeapFactory:
        return FACTORIES[request.param]()


class TestHeapProcess(HeapProcessConformance):
    @pytest.fixture(params=CROSSING)
    def factory_name(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)
