"""The calls of the real driver, against a library that NVIDIA's own header has declared; and without any."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from microserve.kvcache.heap.gpu.cuda_driver import MAX_BATCH, LibCuda
from microserve.protocol.errors import ConfigError, InternalError, TransferFailed
from tests.support.kvcache.heap.heap_conformance import HeapConformance
from tests.support.kvcache.heap.heap_factories import FACTORIES, LIBCUDA, HeapFactory
from tests.support.kvcache.heap.heap_process_conformance import HeapProcessConformance

_SOURCE = Path(__file__).parents[3] / "support" / "kvcache" / "stand_in_cuda.c"


def _include_folder() -> Path | None:
    """Where cuda.h is: a toolkit, or the copy that comes with Triton."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    if (triton := find_spec("triton")) is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    return next((folder for folder in folders if (folder / "cuda.h").exists()), None)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler, include = shutil.which("cc"), _include_folder()
    if compiler is None or include is None:
        pytest.skip("needs a C compiler and cuda.h")
    built = tmp_path_factory.mktemp("libcuda") / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wall", "-Werror", f"-I{include}", str(_SOURCE), "-o", str(built)],
        check=True,
        timeout=60,
    )
    return str(built)


@pytest.fixture(autouse=True)
def environment(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of the tests find it too."""
    monkeypatch.setenv(LIBCUDA, library)


class TestHeap(HeapConformance):
    @pytest.fixture
    def factory(self, environment: None) -> HeapFactory:
        return FACTORIES["libcuda"]()


class TestHeapProcess(HeapProcessConformance):
    @pytest.fixture
    def factory_name(self) -> str:
        return "libcuda"


def test_many_words_go_in_batches(library: str) -> None:
    driver = LibCuda(library=library)
    num_words = 2 * MAX_BATCH + 7
    memory = driver.allocate(8 * num_words)
    stream = driver.create_stream()
    words = np.empty(num_words, np.uint64)

    driver.write_values([memory + 8 * word for word in range(1, num_words)], (1 << 64) - 3, stream)
    driver.copy(words.ctypes.data, memory, words.nbytes, stream)
    driver.synchronize(stream)

    assert words[0] == 0
    assert (words[1:] == (1 << 64) - 3).all()
    driver.wait_value(memory + 8, 1 << 63, stream)
    driver.destroy_stream(stream)
    driver.free(memory)


def test_an_event_is_done_when_the_driver_says_so(library: str) -> None:
    driver = LibCuda(library=library)
    stream = driver.create_stream()
    event = driver.record(stream)
    driver.wait_event(stream, event)

    assert not driver.is_done(event)
    assert driver.is_done(event)
    driver.destroy_event(event)


def test_every_thread_has_the_context(library: str) -> None:
    driver = LibCuda(library=library)
    made = []
    thread = threading.Thread(target=lambda: made.append(driver.create_stream()))
    thread.start()
    thread.join()

    assert made == [driver.create_stream()]


def test_our_own_memory_is_opened_without_asking_the_driver(library: str) -> None:
    driver = LibCuda(library=library)
    memory = driver.allocate(64)
    handle = driver.export(memory)

    assert driver.open(handle) == memory
    driver.close(memory)
    driver.free(memory)
    with pytest.raises(TransferFailed, match=r"cuIpcOpenMemHandle_v2 .* \(1\)"):
        driver.open(handle)


def test_errors_of_the_driver_name_the_call(library: str) -> None:
    driver = LibCuda(library=library)
    with pytest.raises(ConfigError, match="out of memory") as caught:
        driver.allocate(1 << 40)
    assert caught.value.field == "num_blocks"
    with pytest.raises(InternalError, match=r"cuMemFree_v2 failed: something else \(1\)"):
        driver.free(1)


@pytest.mark.parametrize(
    ("device", "path", "message"),
    [
        (0, "libcuda-that-is-nowhere.so", "no NVIDIA driver"),
        (0, "libc.so.6", "no cuInit"),
        (1, None, "stream order"),
        (2, None, "cuda:2 cannot be used"),
    ],
)
def test_a_device_that_cannot_be_used_is_one_clear_line(
    library: str, device: int, path: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LibCuda(device, path or library)

    assert caught.value.field == "device"
    assert "\n" not in caught.value.detail
