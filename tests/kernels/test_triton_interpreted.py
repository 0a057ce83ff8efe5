"""Runs the files in ``interpreted/`` in processes of their own.

Triton decides at its import whether kernels are interpreted or compiled, and other tests here compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["attention", "exact", "exact_step", "philox", "scatter"])
def test_the_interpreted_kernels_pass(name: str) -> None:
    pytest.importorskip("triton", reason="no triton: its kernels are not checked")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / f"{name}.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        env=environment,
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout.splitlines()[-1])
