"""Several files at a time: all of them, or the first error when all have ended."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from microserve.services.local.hub.files import RemoteFile
from microserve.services.local.hub.streams import NUM_STREAMS, fetch_together

FILES = [RemoteFile(f"{n}.safetensors", 100 + n, f"digest {n}") for n in range(2 * NUM_STREAMS)]


def test_all_come_and_the_last_word_is_all_of_them() -> None:
    told: list[int] = []
    fetched: list[str] = []

    def fetch(file: RemoteFile, progress: Callable[[int], None]) -> None:
        progress(file.nbytes // 2)
        fetched.append(file.path)

    fetch_together(FILES, fetch, told.append)
    assert sorted(fetched) == sorted(file.path for file in FILES)
    assert told[-1] == sum(file.nbytes for file in FILES)


def test_equal_content_is_not_fetched_by_two_at_once() -> None:
    twins = [RemoteFile(name, 10, "same") for name in ("a", "b", "c")]
    running = threading.Lock()

    def fetch(file: RemoteFile, progress: Callable[[int], None]) -> None:
        seen.append(file.path)
        if len(seen) == 1:
            assert running.acquire(blocking=False)
            progress(5)
            running.release()

    seen: list[str] = []
    fetch_together(twins, fetch, lambda nbytes: None)
    assert sorted(seen) == ["a", "b", "c"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_ends_the_others_at_their_next_piece(error: type[BaseException]) -> None:
    """``KeyboardInterrupt``: of the thread that waits, while it tells."""
    ended: list[str] = []
    others = threading.Barrier(NUM_STREAMS)  # which nobody passes who begins later

    def fetch(file: RemoteFile, progress: Callable[[int], None]) -> None:
        others.wait(60)
        if error is ValueError and file is FILES[0]:
            raise ValueError("damaged")
        try:
            while True:
                progress(1)
        finally:
            ended.append(file.path)

    def tell(nbytes: int) -> None:
        if error is KeyboardInterrupt and nbytes:
            raise KeyboardInterrupt

    with pytest.raises(error):
        fetch_together(FILES, fetch, tell)
    assert len(ended) == NUM_STREAMS - (error is ValueError), "those that ran; no other has begun"
