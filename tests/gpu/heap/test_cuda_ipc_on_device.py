"""The cuda_ipc heap on a real device: two processes on one GPU."""

from __future__ import annotations

import signal

import pytest

from microserve.kvcache.heap.cuda_ipc import CudaIpcHeap
from tests.kvcache.heap_child import Child, wait_until
from tests.kvcache.heap_conformance import HeapConformance
from tests.kvcache.heap_factories import FACTORIES, MINE, THEIRS, HeapFactory
from tests.kvcache.heap_process_conformance import HeapProcessConformance
from tests.kvcache.kv_samples import POISON_BYTE, data_of, make_layout, set_data


class TestHeap(HeapConformance):
    @pytest.fixture
    def factory(self) -> HeapFactory:
        return FACTORIES["libcuda"]()


@pytest.mark.slow
class TestHeapProcess(HeapProcessConformance):
    num_random_rounds = 10_000

    @pytest.fixture
    def factory_name(self) -> str:
        return "libcuda"

    def traces(self) -> tuple[set[str], set[str], int]:
        """Only ours: the driver opens and keeps what it likes."""
        in_shm, links, num_mappings = super().traces()
        return (
            {name for name in in_shm if "microserve" in name},
            {link for link in links if "microserve" in link},
            num_mappings,
        )


@pytest.mark.slow
def test_nothing_lands_after_the_proof_of_death() -> None:
    """Writers are killed with copies of 32 MiB in their streams, as many as the driver takes."""
    num_blocks = 1 << 18
    with FACTORIES["libcuda"]().create(make_layout(num_blocks=num_blocks), MINE) as heap:
        word = heap.words.arrival(0, 0, 0)
        for number in range(20):
            heap.store(word, 0)
            with Child("libcuda", THEIRS + number, num_blocks) as child:
                child.ask("attach", address=heap.address)
                assert child.ask("hold", slot=1, lane=1)
                child.send("put_for_ever", word=word)
                wait_until(lambda: heap.load(word) > 10, "puts")
                child.signal(signal.SIGKILL)
                wait_until(lambda: not heap.is_held(1, 1), "the writer's end")

                set_data(heap, POISON_BYTE)
                for _ in range(5):
                    assert (data_of(heap) == POISON_BYTE).all()


def test_torch_views_the_pool_without_copying() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch is built without CUDA")
    heap = FACTORIES["libcuda"]().create(make_layout(), MINE)
    assert isinstance(heap, CudaIpcHeap)
    view = torch.as_tensor(heap.data, device="cuda")
    view.fill_(9)
    torch.cuda.synchronize()

    assert (data_of(heap) == 9).all()
    heap.close()
    assert int(view.sum()) == 9 * heap.layout.data_nbytes
