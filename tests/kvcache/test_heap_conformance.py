from __future__ import annotations

import pytest

from tests.kvcache.heap_conformance import (
    CROSSING,
    FACTORIES,
    HeapConformance,
    HeapFactory,
    HeapProcessConformance,
)


class TestHeap(HeapConformance):
    @pytest.fixture(params=FACTORIES)
    def factory(self, request: pytest.FixtureRequest) -> HeapFactory:
        return FACTORIES[request.param]()


class TestHeapProcess(HeapProcessConformance):
    @pytest.fixture(params=CROSSING)
    def factory_name(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)
