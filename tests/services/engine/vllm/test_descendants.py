"""A start that is given up: nothing of it is left, whoever has started it and whether it listens or not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ENDS_ALL = """
import json, os, subprocess, sys
from microserve.services.engine.vllm.descendants import adopt_orphans, kill_descendants

LISTENS_TO_NOBODY = '''
import os, signal, subprocess, sys, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(20):
    threading.Thread(target=signal.pause).start()
if len(sys.argv) > 2:
    subprocess.Popen([sys.executable, "-S", "-c", sys.argv[1], *sys.argv[1:-1]])
os.write(1, f"{os.getpid()}\\\\n".encode())
'''
adopt_orphans()
spared = subprocess.Popen(["sleep", "600"])
read, write = os.pipe()
command = [sys.executable, "-S", "-c", LISTENS_TO_NOBODY, LISTENS_TO_NOBODY, "child", "grandchild"]
child = subprocess.Popen(command, stdout=write)
with os.fdopen(read) as lines:
    pids = [int(lines.readline()) for _ in range(3)]
all_ended = kill_descendants([spared.pid], timeout_s=60.0)
left = [pid for pid in pids if open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"]
print(json.dumps([all_ended, left, spared.poll()]))
spared.kill()
"""


def test_children_of_children_that_listen_to_nobody_end_and_a_spared_one_stays() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", ENDS_ALL], capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout) == [True, [], None]


def test_of_what_nobody_has_started_nothing_is_waited_for() -> None:
    code = "from microserve.services.engine.vllm.descendants import kill_descendants\n"
    code += "print(kill_descendants([], timeout_s=60.0))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "True\n"
