"""The cuda_ipc heap on a real device: two processes on one GPU."""

from __future__ import annotations

import signal

import pytest

from microserve.kvcache.heap.gpu.cuda_ipc import CudaIpcHeap
from tests.support.kvcache.heap.heap_child import Child, wait_until
from tests.support.kvcache.heap.heap_conformance import HeapConformance
from tests.support.kvcache.heap.heap_factories import FACTORIES, MINE, THEIRS, HeapFactory
from tests.support.kvcache.heap.heap_process_conformance import HeapProcessConformance
from tests.support.kvcache.kv_samples import POISON_BYTE, data_of, make_layout, set_data


@pytest.fixture(params=["libcuda", "libcuda_launch"])
def factory_name(request: pytest.FixtureRequest) -> str:
    """Puts by copies of the driver alone, and as engines put: many runs by one launch."""
    name: str = request.param
    if name == "libcuda_launch":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("this torch is built without CUDA")
        from microserve.kernels.scatter.kv_scatter import missing_kernel

        if (detail := missing_kernel(torch.device("cuda", 0))) is not None:
            pytest.skip(detail)
    return name


class TestHeap(HeapConformance):
    @pytest.fixture
    def factory(self, factory_name: str) -> HeapFactory:
        return FACTORIES[factory_name]()


@pytest.mark.slow
class TestHeapProcess(HeapProcessConformance):
    num_random_rounds = 10_000

    def traces(self) -> tuple[set[str], set[str], int]:
        """Only ours: the driver opens and keeps what it likes."""
        in_shm, links, num_mappings = super().traces()
        return (
            {name for name in in_shm if "microserve" in name},
            {link for link in links if "microserve" in link},
            num_mappings,
        )


@pytest.mark.slow
def test_nothing_lands_after_the_proof_of_death(factory_name: str) -> None:
    """Writers are killed with puts of 32 MiB in their streams, as many as the driver takes."""
    num_blocks = 1 << 18
    with FACTORIES[factory_name]().create(make_layout(num_blocks=num_blocks), MINE) as heap:
        word = heap.words.arrival(0, 0, 0)
        for number in range(20):
            heap.store(word, 0)
            with Child(factory_name, THEIRS + number, num_blocks) as child:
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
