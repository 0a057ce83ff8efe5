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
    *pytest*) echo "$TESTS"; exit "$TESTS_CODE" ;;
    *exactness*) echo "$EXACT"; exit 0 ;;
    *gpu_kernels*) echo "A GPU, 132 multiprocessors"; exit 0 ;;
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


@pytest.mark.parametrize(
    ("tests", "code", "exact", "failed"),
    [
        ("40 passed, 2 skipped in 3 s", "0", "exact", []),
        ("1 failed, 40 passed in 3 s", "1", "exact", ["tests/gpu"]),
        ("42 skipped in 3 s", "0", "exact", ["tests/gpu"]),
        ("40 passed in 3 s", "0", "3 MISMATCHES", ["strategies"]),
        ("no tests ran", "5", "", ["tests/gpu", "strategies"]),
    ],
)
def test_the_table_says_what_failed(
    tmp_path: Path, tests: str, code: str, exact: str, failed: list[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    done = check(PYTHON=str(python), TESTS=tests, TESTS_CODE=code, EXACT=exact)

    assert done.returncode == bool(failed), done.stderr
    *_, title, first, second, third = done.stdout.splitlines()
    assert title == "A GPU, 1 device(s)"
    rows = {"tests/gpu": first, "strategies": second, "benchmarks": third}
    for name, row in rows.items():
        assert row.startswith(name)
        assert ("FAILED" if name in failed else "passed") in row[44:56]
