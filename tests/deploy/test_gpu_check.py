"""deploy/gpu_check.sh: one line where there is no GPU; where there is one, a table that cannot lie."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "gpu_check.sh"
STAND_IN = """#!/bin/bash
case "$*" in
    *"pytest"*" tests/gpu/heap/test_nvshmem"*) echo "$NVSHMEM"; exit 0 ;;
    *"pytest"*" tests/gpu/kernels"*) echo "3 passed in 1 s"; exit 0 ;;
    *"pytest"*" tests/gpu/engine/test_exact"*) echo "$ROWS"; exit 0 ;;
    *"pytest"*" tests/gpu/engine"*) echo "4 passed in 1 s"; exit 0 ;;
    *"pytest"*" tests/gpu --ignore=tests/gpu/heap/test_nvshmem"*) echo "$TESTS"; exit "$TESTS_CODE" ;;
    *exactness*"--dtype bfloat16 --set engine.cuda_exact=true"*) echo "$BITS"; exit 0 ;;
    *exactness*) echo "$EXACT"; exit 0 ;;
    *gpu_kernels*) echo "A GPU, 132 multiprocessors"; exit 0 ;;
    *benchmarks/gpu/gpu.py*) echo "$GOALS"; exit 0 ;;
    *benchmarks/gpu/gpu_exact.py*) echo "$COST"; exit 0 ;;
    -) echo "A GPU, 1 device(s)" ;;
esac
"""
"""A Python on a machine with a GPU, as far as the script can see."""


def check(**environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, **environment}
    return subprocess.run([str(SCRIPT)], env=merged, capture_output=True, text=True, timeout=60, check=False)


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has an NVIDIA driver")
    done = check()

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpu_check: no NVIDIA GPU here, nothing was checked (libcuda.so.1")


RIGHT = {
    "TESTS": "40 passed, 2 skipped in 3 s",
    "TESTS_CODE": "0",
    "NVSHMEM": "1 passed in 9 s",
    "ROWS": "6 passed in 60 s",
    "BITS": "exact",
    "EXACT": "exact",
    "COST": "0 of 3 goals met; missed: all",
    "GOALS": "8 of 8 goals met",
}


@pytest.mark.parametrize(
    ("found", "failed"),
    [
        ({}, []),
        ({"TESTS": "1 failed, 40 passed in 3 s", "TESTS_CODE": "1"}, ["heaps"]),
        ({"TESTS": "42 skipped in 3 s"}, ["heaps"]),
        ({"NVSHMEM": "1 skipped in 3 s"}, ["nvshmem"]),
        ({"ROWS": "6 skipped in 1 s"}, ["exact rows"]),
        ({"BITS": "2 MISMATCHES"}, ["exact mesh"]),
        ({"EXACT": "3 MISMATCHES"}, ["strategies"]),
        ({"COST": "gpu_exact: no CUDA device: nothing is measured"}, ["benchmarks/gpu/gpu_exact.py"]),
        ({"TESTS": "no tests ran", "TESTS_CODE": "5", "EXACT": ""}, ["heaps", "strategies"]),
        ({"GOALS": "0 of 8 goals met; missed: all"}, []),  # a measurement, and no test
        ({"GOALS": "gpu: no CUDA device: nothing is measured"}, ["benchmarks/gpu/gpu.py"]),
    ],
)
def test_the_table_says_what_failed(tmp_path: Path, found: dict[str, str], failed: list[str]) -> None:
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    done = check(PYTHON=str(python), **{**RIGHT, **found})

    assert done.returncode == bool(failed), done.stderr
    names = [
        "heaps",
        "nvshmem",
        "kernels",
        "engine",
        "exact rows",
        "exact mesh",
        "strategies",
        "benchmarks/gpu/gpu_kernels",
        "benchmarks/gpu/gpu.py",
        "benchmarks/gpu/gpu_exact.py",
    ]
    title, *rows = done.stdout.splitlines()[-len(names) - 1 :]
    assert title == "A GPU, 1 device(s)"
    for name, row in zip(names, rows, strict=True):
        assert row.startswith(name)
        assert ("FAILED" if name in failed else "passed") in row[44:56]
