"""How fast this machine's memory is read now: the bound of a decode, measured beside it.

An array of huge pages, far larger than any cache here, read once by every thread's share. numpy's ``or`` of
64-bit words was, but for torch's `max` by a hair, the fastest of seven readers that were tried.
"""

from __future__ import annotations

import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Speed:
    """GB/s (10^9 bytes)."""

    wall: float
    cpu: float
    """As if no other process had taken a core meanwhile."""


class Memory:
    def __init__(self) -> None:
        area = mmap.mmap(-1, NBYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            area.madvise(mmap.MADV_HUGEPAGE)
        self._words = np.frombuffer(area, np.int64)
        self._words[:] = 1
        self._threads = ThreadPoolExecutor()

    def read(self, num_threads: int) -> Speed:
        """Of one pass by so many threads."""
        shares = np.array_split(self._words, num_threads)
        began = time.perf_counter()
        # numpy gives up the interpreter's lock while it reduces.
        cpu_s = list(self._threads.map(_read, shares))
        return Speed(NBYTES / (time.perf_counter() - began) / 1e9, NBYTES / max(cpu_s) / 1e9)


def _read(share: npt.NDArray[np.int64]) -> float:
    """CPU seconds."""
    began = time.thread_time()
    np.bitwise_or.reduce(share)
    return time.thread_time() - began
