"""Several files at a time, told of as one: a connection to a store of files is slower than most networks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from microserve.services.local.hub.files import RemoteFile

NUM_STREAMS = 4
TELL_S = 0.1
"""Between two reports of how far all of them are."""

FetchOne = Callable[[RemoteFile, Callable[[int], None]], object]
"""Fetches a file and calls the other with how many bytes of it are here; what that raises ends it."""


class _Stopped(Exception):
    """Another file has failed, or nobody waits any more."""


def fetch_together(files: Sequence[RemoteFile], fetch: FetchOne, tell: Callable[[int], None]) -> None:
    """``tell`` is called in this thread, with the bytes of all. The first error ends the others, each at its
    next piece, and is raised when they have ended; so it is with an interrupt."""
    lengths = dict.fromkeys((file.path for file in files), 0)
    stopped = threading.Event()

    def one(file: RemoteFile) -> None:
        def progress(nbytes: int) -> None:
            lengths[file.path] = nbytes
            if stopped.is_set():
                raise _Stopped

        try:
            progress(0)
            fetch(file, progress)
        except BaseException:
            stopped.set()
            raise
        lengths[file.path] = file.nbytes

    with ThreadPoolExecutor(NUM_STREAMS, "fetch") as pool:
        # Equal content is one file in the cache: who comes second finds it.
        firsts = {file.digest or file.path: file for file in files}.values()
        seconds = [file for file in files if file not in firsts]
        try:
            for batch in (list(firsts), seconds):
                pending: set[Future[None]] = {pool.submit(one, file) for file in batch}
                while pending:
                    done, pending = wait(pending, timeout=TELL_S, return_when=FIRST_EXCEPTION)
                    tell(sum(lengths.values()))
                    for each in done:
                        if not isinstance(each.exception(), _Stopped):  # then another one says why
                            each.result()
        except BaseException:
            stopped.set()
            raise
