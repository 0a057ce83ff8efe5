"""Which kernel writes a step's own KV: decided once for a device; nvcc and CuPy may be missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from microserve.kernels import cuda_module, reference
from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.kernels.scatter.kv_scatter import kv_scatter, missing_kernel


@pytest.fixture(autouse=True)
def undecided() -> Iterator[None]:
    missing_kernel.cache_clear()
    yield
    missing_kernel.cache_clear()


def test_a_device_is_asked_once_and_keeps_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(device: torch.device) -> None:
        asked.append(device)
        if device.index == 0:
            raise KernelUnavailable("no nvcc: install the CUDA toolkit")

    monkeypatch.setattr(cuda_module, "load", load)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert [missing_kernel(first), missing_kernel(first)] == ["no nvcc: install the CUDA toolkit"] * 2
    assert [missing_kernel(second), missing_kernel(second)] == [None, None]
    assert asked == [first, second]


def test_on_a_cpu_it_writes_what_the_oracle_writes_and_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(device: torch.device) -> None:
        raise AssertionError(f"{device} was asked")

    monkeypatch.setattr(cuda_module, "load", load)
    key, value = torch.randn(2, 3, 2, 5)
    slots = torch.tensor([9, -1, 4])
    layer = torch.full((3, 2, 4, 2, 5), float("nan"))
    want = layer.clone()
    kv_scatter(key, value, slots, layer)
    reference.write_kv(want, key, value, slots)
    torch.testing.assert_close(layer, want, rtol=0, atol=0, equal_nan=True)


def test_what_does_not_fit_is_named() -> None:
    rows, layer = torch.zeros(3, 2, 5), torch.zeros(3, 2, 4, 2, 5)
    with pytest.raises(ValueError, match=r"slots is torch\.int32"):
        kv_scatter(rows, rows, torch.zeros(3, dtype=torch.int32), layer)
