"""What is shared by a name in /dev/shm goes with the engine, when its whole process group is killed, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.kvcache.heap.heap_child import wait_until

SHARES = """
import time
from multiprocessing.shared_memory import SharedMemory
from microserve.services.engine.vllm.tracker import start_tracker
start_tracker()
print(SharedMemory(create=True, size=4096).name, flush=True)
time.sleep(600)
"""


def test_a_killed_process_group_leaves_no_name_behind() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SHARES], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        shared = Path("/dev/shm") / process.stdout.readline().strip()
        try:
            assert shared.is_file()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    wait_until(lambda: not shared.exists(), "its name is gone")
