"""Times of work on a device, the rates that nothing on it can beat, and what the machine is.

Owns the clock: CUDA events around queued work on a GPU, the host's clock on a CPU (where the same code is
tried out, and nothing is learned about GPUs). Must not know what is measured.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

CEILING_NBYTES = 1 << 30
"""Read or copied at once by the ceilings: far more than any cache holds."""
MATMUL_SIZE = 8192

Run = Callable[[int], object]
"""One round's work; the round says at which place."""


def seconds(device: torch.device, rounds: int, run: Run) -> float:
    """Median time of one round: on a GPU by its own clock and without what launching costs the host."""
    if device.type != "cuda":
        return _host_seconds(rounds, run)
    for round_ in range(3):
        run(round_)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    torch.cuda.synchronize(device)
    torch.cuda._sleep(1 << 26)  # the launches queue up behind it: their own cost is not measured
    for round_, (begin, end) in enumerate(marks):
        begin.record()
        run(round_)
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in marks) / 1e3


def _host_seconds(rounds: int, run: Run) -> float:
    times = []
    for round_ in range(rounds):
        started = time.perf_counter()
        run(round_)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def read_seconds(device: torch.device, rounds: int, nbytes: int = CEILING_NBYTES) -> float:
    """A sum over ``nbytes``: what reads this fast reads as fast as torch can."""
    buffer = torch.ones(nbytes // 4, device=device)
    return seconds(device, rounds, lambda _: buffer.sum())


def copy_seconds(device: torch.device, rounds: int, nbytes: int = CEILING_NBYTES) -> float:
    """A copy of ``nbytes`` within the device: as many are read, and as many written."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return seconds(device, rounds, lambda _: target.copy_(source))


def matmul_seconds(device: torch.device, rounds: int, size: int = MATMUL_SIZE) -> float:
    """bf16, ``size`` by ``size``: 2 * size**3 operations. Random numbers: zeros would draw less power, and
    so run at a higher clock."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    return seconds(device, rounds, lambda _: torch.matmul(left, right, out=out))


def describe(device: torch.device) -> str:
    """Date, device, driver, CUDA and the versions of what computes on it, in one line."""
    parts = [time.strftime("%Y-%m-%d")]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts.append(f"{properties.name}, {properties.multi_processor_count} multiprocessors")
        parts.append(f"driver {driver_version()}")
        parts.append(f"CUDA {torch.version.cuda}")
    else:
        parts.append(f"{device}, {torch.get_num_threads()} threads")
    parts.append(f"torch {torch.__version__}")
    parts.append(f"triton {_installed('triton')}")
    parts.append(f"cupy {_installed('cupy-cuda13x', 'cupy-cuda12x', 'cupy')}")
    return ", ".join(parts)


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Of the kernel module; ``unknown`` where it does not say."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", file.read_text())
    except OSError:
        return "unknown"
    return found.group() if found else "unknown"


def _installed(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "missing"
