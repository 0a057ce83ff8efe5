"""The nvshmem heap on a real device: a world of two ranks on one GPU, without MPS."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.kvcache.heap.heap_child import PYTHONPATH, ROOT

TIMEOUT_S = 240.0
ENVIRONMENT = {
    # Two ranks on one device: multicast cannot be bound, and nothing leaves the device.
    "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_REMOTE_TRANSPORT": "none",
    "NVSHMEM_SYMMETRIC_SIZE": str(1 << 28),
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo",
    "PYTHONPATH": PYTHONPATH,
}


@pytest.mark.slow
def test_ten_thousand_transfers_between_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("nvshmem", reason="needs nvshmem4py")
    # Not in this process: NVSHMEM ends its process on errors.
    with ExitStack() as stack:
        ranks = []
        for rank in range(2):
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.heap.nvshmem_rank", str(rank), str(tmp_path)],
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            ranks.append(process)
        for process in ranks:
            output, _ = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, output
            assert " 0 wrong bytes" in output
