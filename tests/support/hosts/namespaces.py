"""A host's namespaces: network, processes, mounts, IPC and name, all without a name of their own.

Owns how they are made, entered and ended. They live as long as their first process does, which is tied to
this one (leash.py): whoever runs the tests may be killed at any moment, and the kernel removes every
process, interface and mount of theirs. So there is nothing to clean up after a crash, and no address that
could be somebody else's on this machine. Knows neither links nor services.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from microserve.services.local import leash

NET, PID = 0x40000000, 0x20000000
_ENTER = Path(__file__).with_name("enter.py")
_FIRST = "echo made; exec sleep infinity"
_LEASH = [sys.executable, "-S", "-E", str(leash.__file__)]

_libc = ctypes.CDLL(None, use_errno=True)


@functools.cache
def why_not() -> str:
    """Why no hosts can be made here, in a sentence; empty where they can."""
    if sys.platform != "linux":
        return "a mesh of hosts needs Linux: its hosts are network namespaces"
    if os.geteuid() != 0:
        return "a mesh of hosts needs root: its hosts are namespaces, with interfaces and mounts of their own"
    line = (
        "ip link add name trunk type bridge && ip link add name one type veth peer name two && "
        "tc qdisc add dev one root tbf rate 10mbit burst 32kb latency 50ms"
    )
    command = ["unshare", "--net", "--pid", "--mount", "--ipc", "--uts", "--fork", "--mount-proc", "sh", "-c"]
    try:
        done = subprocess.run([*command, line], capture_output=True, text=True, timeout=20, check=False)
    except OSError as error:
        return f"a mesh of hosts needs unshare of util-linux: {error}"
    if done.returncode:
        return f"a mesh of hosts needs namespaces, bridges, veth pairs and tbf: {done.stderr.strip()}"
    return ""


class Namespaces:
    """Made at once; :meth:`end` ends all that runs in them. Use it in the main thread (leash.py)."""

    def __init__(self) -> None:
        """Raises ``RuntimeError`` where they cannot be made."""
        # Mounts are private to them (unshare's default), and their processes are not in others' /proc.
        command = ["unshare", "--net", "--pid", "--mount", "--ipc", "--uts", "--fork", "--kill-child"]
        command += ["--mount-proc", "sh", "-c", _FIRST]
        self._maker = subprocess.Popen(
            [*_LEASH, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # it complains of being killed
            text=True,
        )
        assert self._maker.stdout is not None
        if self._maker.stdout.readline() != "made\n":
            _, complaint = self._maker.communicate(timeout=10)
            raise RuntimeError(f"no namespaces: {complaint.strip()}")
        children = Path(f"/proc/{self._maker.pid}/task/{self._maker.pid}/children").read_text().split()
        self.first = int(children[0])
        """Their first process, by our own count."""
        self._pidfd = os.pidfd_open(self.first)
        self._started: list[subprocess.Popen[str]] = []

    def start(
        self,
        command: Sequence[str],
        *,
        sink: IO[str] | int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """A process in them; its pid, as we see it, is the command's own."""
        require_main_thread()
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(self._pidfd, PID)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-S", "-E", str(_ENTER), str(self._pidfd), *command],
                    pass_fds=[self._pidfd],
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT if sink is not None else None,
                    env=None if environment is None else dict(environment),
                    text=True,
                )
            finally:
                _setns(own, PID)
        finally:
            os.close(own)
        self._started = [each for each in self._started if each.returncode is None] + [process]
        return process

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """A command's end and all it said, errors included."""
        process = self.start(command, sink=subprocess.PIPE, environment=environment)
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(list(command), process.returncode, said)

    def do(self, *command: str) -> str:
        """What a command said. Raises ``RuntimeError`` if it failed."""
        done = self.run(*command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout.strip()}")
        return done.stdout

    def ip(self, *lines: str) -> None:
        """``ip`` commands on their interfaces, in one process: who asks may have peers that wait for him.
        Raises ``RuntimeError`` if one failed."""
        with self.joined():
            done = subprocess.run(
                ["ip", "-batch", "-"], input="\n".join(lines), capture_output=True, text=True, check=False
            )
        if done.returncode:
            raise RuntimeError(f"ip {'; '.join(lines)}: {done.stderr.strip()}")

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Sockets that this thread opens meanwhile, or threads that it starts, are theirs, and stay so."""
        require_main_thread()
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(self._pidfd, NET)
            try:
                yield
            finally:
                _setns(own, NET)
        finally:
            os.close(own)

    @property
    def has_ended(self) -> bool:
        return self._maker.poll() is not None

    def end(self) -> None:
        """Every process in them is killed; none is left when this returns. Again is no error."""
        if self._pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)
        # The kernel ends all of them, and lets the first one go when the others are waited for.
        for process in self._started:
            process.wait(30)
        self._maker.communicate(timeout=30)
        os.close(self._pidfd)
        self._pidfd = -1


def require_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("hosts are tied to the main thread: start and join them there")


def _setns(descriptor: int, kind: int) -> None:
    if _libc.setns(descriptor, kind) != 0:
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    # For the Makefile: a sentence and exit code 1 where there can be no hosts.
    if reason := why_not():
        sys.exit(f"Error: {reason}")
