"""The child: ``python -m microserve.gateway.helper.main SETUP``; jobs from stdin, answers to stdout.

Owns what a template that breaks out of its sandbox would find: no keys in the environment, no right to write
a file, a bound on memory. Its end is its parent's (EOF), never a signal that was meant for the parent.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from typing import BinaryIO

import msgspec

from microserve.gateway.helper.jobs import HEAD, JOBS, Setup, encode
from microserve.gateway.helper.work import Worker

OOM_SCORE = "1000"
"""Should the machine run out of memory all the same, this process is the first to go."""


def limit(memory_mb: int) -> None:
    """As far as the system has it (RLIMIT_DATA counts what is mapped only on Linux)."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(OOM_SCORE)
    for what, limit_nbytes in (
        (resource.RLIMIT_DATA, memory_mb << 20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(what, (limit_nbytes, limit_nbytes))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the end of a budget


def serve(setup: Setup, questions: BinaryIO, answers: BinaryIO) -> None:
    worker = Worker(setup)
    while len(head := questions.read(HEAD.size)) == HEAD.size:
        num_message, num_bulk = HEAD.unpack(head)
        message, bulk = questions.read(num_message), questions.read(num_bulk)
        if len(message) < num_message or len(bulk) < num_bulk:
            return
        result, more = worker.do(JOBS.decode(message), bulk)
        encoded = encode(result)
        answers.write(HEAD.pack(len(encoded), len(more)) + encoded)
        answers.write(more)
        answers.flush()


def main() -> None:
    setup = msgspec.json.decode(sys.argv[1], type=Setup)
    limit(setup.memory_mb)
    # What a library prints must not come between answers.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        serve(setup, sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
