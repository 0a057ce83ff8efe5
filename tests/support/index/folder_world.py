"""A world of NVSHMEM for several processes without a GPU: host_world.py, whose ranks meet in a folder."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import cast

from tests.support.engine.device.host_driver import HostDriver
from tests.support.engine.device.host_world import HostRank, HostWorld

TIMEOUT_S = 60.0
LOOK_S = 0.005


def publish(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.rename(path)


def fetch(path: Path) -> bytes:
    """What somebody publishes there, as soon as it is there."""
    pause = threading.Event()
    for _ in range(int(TIMEOUT_S / LOOK_S)):
        if path.exists():
            return path.read_bytes()
        pause.wait(LOOK_S)
    raise TimeoutError(path)


class _Handles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __setitem__(self, rank: int, handle: bytes) -> None:
        publish(self._folder / f"memory{rank}", handle)

    def __getitem__(self, rank: int) -> bytes:
        return fetch(self._folder / f"memory{rank}")


class FolderRank(HostRank):
    def __init__(self, folder: Path, unique_id: bytes, rank: int, num_ranks: int, driver: HostDriver) -> None:
        # Ranks that were given different ids never meet.
        name = hashlib.blake2b(unique_id, digest_size=8).hexdigest()
        self._folder = folder / name
        self._folder.mkdir(exist_ok=True)
        world = HostWorld(num_ranks, name=name, handles=cast(dict[int, bytes], _Handles(self._folder)))
        super().__init__(world, rank, driver)

    def barrier(self) -> None:
        publish(self._folder / f"ready{self.rank}", b"")
        for rank in range(self.num_ranks):
            fetch(self._folder / f"ready{rank}")
