"""Python's resource tracker, out of reach of a kill that ends the engine.

vLLM's processes share memory and semaphores by names in /dev/shm. The tracker, one process for all of them,
removes the names once none of them is left, however they ended. But a supervisor kills what is left of an
engine by its process group: so the tracker has a session of its own. It ends by itself.

Owns its start. Knows neither vLLM nor which names there are.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from multiprocessing import resource_tracker, util
from typing import Any

_started: list[subprocess.Popen[bytes]] = []
"""Kept, for nobody waits for it: it outlives us."""


def start_tracker() -> None:
    """Before anything is shared or spawned; nothing if it runs already. Children use their parent's."""
    theirs = util.spawnv_passfds
    util.spawnv_passfds = _spawn
    try:
        resource_tracker.ensure_running()
    finally:
        util.spawnv_passfds = theirs


def tracker_pids() -> list[int]:
    """Of the one that we have started, if we have."""
    return [tracker.pid for tracker in _started]


def _spawn(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
    """As ``multiprocessing.util`` starts it, but as the leader of a session."""
    tracker = subprocess.Popen(args, executable=path, pass_fds=passfds, start_new_session=True)
    _started.append(tracker)
    return tracker.pid
