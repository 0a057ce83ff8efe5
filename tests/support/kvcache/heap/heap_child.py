"""Drives heap_process.py: another process with a heap, for tests to stop, continue and kill."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from microserve.protocol.messages.kv.grant import HeapAddress

TIMEOUT_S = 30.0
START_S = 120.0
"""NIXL alone takes a second on an idle machine before it has an agent, and twenty on a busy one."""
ROOT = Path(__file__).parents[4]
PYTHONPATH = os.pathsep.join((str(ROOT / ".src"), *filter(None, sys.path)))
"""What this process imports from, for its children."""

HEAP_PROCESS = "tests.support.kvcache.heap.heap_process"

_CARDS = 'mount -t sysfs sysfs /sys && exec "$@"'
"""Where UCX looks for cards."""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        os.sched_yield()


class Child:
    """A process with a heap of its own, that does what it is told over its pipes."""

    def __init__(
        self, factory: str, incarnation: int, num_blocks: int = 8, *, module: str = HEAP_PROCESS
    ) -> None:
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
        enter: list[str] = []
        if other := os.environ.get("MICROSERVE_TEST_OTHER"):  # networks.sh
            environment["MICROSERVE_TEST_DOOR_HOST"] = os.environ["MICROSERVE_TEST_OTHER_HOST"]
            enter = ["nsenter", "--target", other, "--net", "unshare", "--mount", "sh", "-c", _CARDS, "sh"]
        self._process = subprocess.Popen(
            [
                *enter,
                *(sys.executable, "-m", module),
                *(factory, str(incarnation), str(num_blocks)),
            ],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self._process.pid
        self.address = msgspec.convert(self.receive(START_S), HeapAddress)

    def send(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode({"do": do, **arguments}) + b"\n")
        self._process.stdin.flush()

    def receive(self, timeout_s: float = TIMEOUT_S) -> Any:
        assert self._process.stdout is not None
        # One answer for one question, so no second line hides in the buffered reader.
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise TimeoutError(f"child {self.pid} does not answer")
        return json.loads(self._process.stdout.readline())

    def ask(self, do: str, **arguments: Any) -> Any:
        self.send(do, **arguments)
        return self.receive()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop(self) -> None:
        """SIGSTOP, and wait until the kernel has stopped it."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def ended(self) -> int:
        """Its exit code, once it has ended by itself."""
        return self._process.wait(TIMEOUT_S)

    def kill(self) -> None:
        """SIGKILL, and reap it."""
        self._process.kill()
        self._process.wait(TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
