"""One allocation of vLLM's becomes the heap; everything else is torch's."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
import torch

from microserve.kvcache.heap.shm import ShmView
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import ConfigError
from microserve.services.engine.vllm.connector.placement import Placement
from tests.support.kvcache.kv_samples import make_layout

pytestmark = pytest.mark.slow
LAYOUT = msgspec.structs.replace(make_layout(num_blocks=8), order="vllm")
NAMES = ["one", "two"]


@pytest.fixture
def refused() -> list[ConfigError]:
    return []


@pytest.fixture
def placement(refused: list[ConfigError]) -> Iterator[Placement]:
    placement = Placement(lambda: LAYOUT, incarnation=3, num_slots=4, refuse=refused.append)
    yield placement
    if placement.is_entered:
        placement.heap.close()


def views_of(buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """As vLLM has them: ``[block, head, row, K and V]`` of each layer."""
    layers = buffer.view(torch.float16).view(2, LAYOUT.num_blocks, 1, LAYOUT.block_size, 8)
    return dict(zip(NAMES, layers, strict=True))


def test_the_cache_is_the_heaps_data_and_another_process_sees_it(placement: Placement) -> None:
    with placement:
        other = torch.zeros(LAYOUT.data_nbytes, dtype=torch.uint8)
        buffer = torch.zeros(LAYOUT.data_nbytes, dtype=torch.int8, device=torch.device("cpu"))
    base = placement.heap.data.ctypes.data
    assert buffer.data_ptr() == base != other.data_ptr()
    assert not buffer.any()
    views = views_of(buffer)
    placement.require_placed(NAMES, views)

    views["two"][3, 0, 1, 2] = 1.5
    view = ShmView.open(placement.heap.address, LAYOUT)
    at = LAYOUT.layer_nbytes + 3 * LAYOUT.block_nbytes + (8 + 2) * 2
    assert view.read_data(at, 2).view("float16").item() == 1.5
    view.close()
    assert torch.zeros(LAYOUT.data_nbytes, dtype=torch.int8).data_ptr() != base, "only in its allocation"


def test_a_vllm_that_allocates_otherwise_does_not_start(placement: Placement) -> None:
    with pytest.raises(ConfigError, match="without asking"):
        _ = placement.heap
    with placement:
        elsewhere = torch.empty(LAYOUT.data_nbytes, dtype=torch.int8)
        buffer = torch.zeros(LAYOUT.data_nbytes, dtype=torch.int8)
    with pytest.raises(ConfigError, match="one: offset"):
        placement.require_placed(NAMES, views_of(elsewhere))
    views = views_of(buffer)
    with pytest.raises(ConfigError, match="layers with KV"):
        placement.require_placed(NAMES, {"one": views["one"]})
    with pytest.raises(ConfigError, match="one: offset"):
        placement.require_placed(NAMES, {"one": views["two"], "two": views["one"]})


def test_what_fails_as_the_allocation_begins_is_heard(refused: list[ConfigError]) -> None:
    def make_layout() -> KvLayout:
        raise ConfigError("no such layout", field="kv_cache_dtype")

    with (
        pytest.raises(ConfigError, match="no such layout"),
        Placement(make_layout, incarnation=3, num_slots=4, refuse=refused.append),
    ):
        pass
    assert [error.field for error in refused] == ["kv_cache_dtype"]
