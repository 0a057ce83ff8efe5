"""Engines of a test run are forked from one process that has imported torch and transformers.

To import them takes six seconds of a processor, and a run starts a hundred engines. Owns that process, and
what ``subprocess.Popen`` offers for a child of it. All else is an engine's own: arguments, environment, log,
signals, end. How one starts from nothing is for the tests of ``microserve up``. The nursery ends when its
input does, and its children with it: a test run that is killed leaves nobody.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Protocol

PR_SET_PDEATHSIG = 1


class Process(Protocol):
    """What tests ask of a service's process, whoever started it."""

    pid: int

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Nursery:
    """One a process; ``fork`` from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._end)

    def fork(self, arguments: list[str], log: Path, environment: dict[str, str]) -> ForkedProcess:
        """A ``microserve`` command with ``arguments``, that writes to ``log``."""
        return ForkedProcess(self, self.ask({"run": arguments, "log": str(log), "environment": environment}))

    def ask(self, question: dict[str, Any]) -> Any:
        with self._lock:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def _end(self) -> None:
        with self._process:  # closes its input and waits
            pass


class ForkedProcess:
    """``subprocess.Popen`` of a nursery's child; its pid stays its own until ``poll`` has seen the end."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if (code := self.poll()) is not None:
            return code
        descriptor = os.pidfd_open(self.pid)
        try:
            if not select.select([descriptor], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        finally:
            os.close(descriptor)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def nursery() -> Nursery:
    return Nursery()


# --- in the nursery ------------------------------------------------------------------------------


def serve() -> None:
    """One question a line: what to run (answer: its pid), or who has ended (its exit code, or null)."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (by name the model's own class is lazy)

    import microserve.services.engine.service  # noqa: F401
    from microserve.services.command.main import main

    # Not through sys.stdin: what it has read ahead would be read again in a child.
    questions, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    own = os.getpid()
    for line in iter(questions.readline, ""):
        question = json.loads(line)
        if (pid := question.get("poll")) is not None:
            ended, status = os.waitpid(pid, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork()
            if answer == 0:
                os.close(questions.fileno())
                os.close(answers.fileno())
                _become(own, question)
                main.main(args=question["run"], prog_name="microserve")
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _become(parent: int, question: dict[str, Any]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    sink = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    empty = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((empty, 0), (sink, 1), (sink, 2)):
        os.dup2(old, new)
    os.close(sink)
    os.close(empty)
    os.environ.clear()
    os.environ.update(question["environment"])
