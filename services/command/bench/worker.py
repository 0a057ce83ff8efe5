"""A process of a run with several, and how it is spoken to: a task in, ``ready``, the start, a result out.

``python -m microserve.services.command.bench.worker``. What is said is msgpack with its length before it, on
standard input and output; a process whose parent ends is ended by the kernel (local/leash.py).
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from microserve.services.command.bench.task import Load, Result, Share, Words, WorkerTask
from microserve.services.command.client.endpoint import Endpoint
from microserve.services.local import leash

MODULE = "microserve.services.command.bench.worker"
START_S = 0.1
"""From the last process's being ready to the common beginning."""

T = TypeVar("T")
_length = struct.Struct("<Q")


class WorkerLost(Exception):
    """A process ended before its result."""


def write(stream: IO[bytes], value: object) -> None:
    data = msgspec.msgpack.encode(value)
    stream.write(_length.pack(len(data)) + data)
    stream.flush()


def read(stream: IO[bytes], kind: type[T]) -> T:
    """Raises :class:`WorkerLost` where the other end is gone."""
    head = stream.read(_length.size)
    data = stream.read(_length.unpack(head)[0]) if len(head) == _length.size else b""
    if not data:
        raise WorkerLost("a process of the load generator has ended early")
    return msgspec.msgpack.decode(data, type=kind)


def run_workers(
    endpoint: Endpoint, load: Load, words: Words, num_processes: int
) -> tuple[float, Sequence[Result]]:
    """When they began together, and what each brings. Raises :class:`WorkerLost`."""
    from microserve.services.command.bench.load import CLOCK

    command = [sys.executable, "-S", "-E", str(Path(leash.__file__)), str(os.getpid())]
    command += [sys.executable, "-P", "-m", MODULE]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(num_processes)
    ]
    try:
        for index, worker in enumerate(workers):
            assert worker.stdin is not None
            share = Share(index, num_processes)
            task = WorkerTask(endpoint.url, endpoint.api_key, endpoint.tls_cert, load, words, share)
            write(worker.stdin, task)
        for worker in workers:
            assert worker.stdout is not None
            read(worker.stdout, bool)
        start_s = CLOCK() + START_S
        for worker in workers:
            assert worker.stdin is not None
            write(worker.stdin, start_s)
        results = []
        for worker in workers:
            assert worker.stdout is not None
            results.append(read(worker.stdout, Result))
        return start_s, results
    except BrokenPipeError:
        raise WorkerLost("a process of the load generator has ended early") from None
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def main() -> None:
    from microserve.services.command.bench.load import prepared, run, send_share

    task = read(sys.stdin.buffer, WorkerTask)
    endpoint = Endpoint.at(task.url, task.api_key, task.tls_cert)
    with prepared():
        write(sys.stdout.buffer, True)
        start_s = read(sys.stdin.buffer, float)
        write(sys.stdout.buffer, run(send_share(endpoint, task.load, task.words, task.share, start_s)))


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, WorkerLost, BrokenPipeError):
        sys.exit(130)  # whoever asked has ended, and says so
