"""The state directory of a mesh on this machine: who runs it, and how its children are.

Owns ``.microserve/``: ``mesh.pid`` (locked as long as its supervisor lives, so a stale one deceives nobody),
``mesh.json`` (replaced whole at every change), ``targets.json`` (Prometheus') and ``logs/``. Written by the
supervisor, read by ``ps``, ``down`` and ``up --detach``. A supervisor whose disk takes nothing says so by a
second lock, which needs no room: what is read then is out of date.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from microserve.services.local.supervisor import Child

STATE_DIRECTORY = ".microserve"

HOLD_ATTEMPTS = 5
HOLD_RETRY_S = 0.02
"""Somebody who only asks (``ps``) has the lock for a moment."""

_FLOCK = struct.Struct("hhqqi4x")
"""struct flock: type, whence, start, len, pid."""


class ChildState(msgspec.Struct, frozen=True):
    name: str
    state: str
    pid: int
    address: str
    restarts: int
    detail: str
    log: str
    about: str = ""
    """What it says of itself, in words."""
    facts: Mapping[str, str] = {}
    """By name, of an engine: ``backend``, ``backend_version``, ``heaps``, ``numerics``, ``exact``, and the
    addresses ``events`` and ``replay``."""
    metrics: str = ""
    """``HOST:PORT`` at which its metrics are read; empty: nowhere of its own."""

    @classmethod
    def of(cls, child: Child) -> ChildState:
        return cls(
            child.name,
            child.state.value,
            child.pid,
            child.address,
            child.restarts,
            child.detail,
            str(child.log),
            child.about,
            child.facts,
            child.metrics,
        )


class ForeignState(msgspec.Struct, frozen=True):
    """An engine of other people whose KV events the index follows (``index.foreign``); whether it lives, the
    index knows."""

    engine_id: str
    model: str
    events: str
    """Addresses."""
    replay: str = ""


class MeshState(msgspec.Struct, frozen=True):
    """What ``ps --json`` prints."""

    pid: int
    """Of the supervisor."""
    url: str
    """Of the gateway."""
    model: str
    children: list[ChildState]
    ready: bool = False
    """Every child has been ready."""
    failure: str = ""
    """Why the supervisor gave up."""
    index: str = ""
    """Its address."""
    router: str = ""
    keys: str = ""
    """Directory of keys; empty: it runs without, on purpose."""
    foreign: list[ForeignState] = []
    stale: bool = False
    """For who reads it: something has changed since, and could not be written."""


class AlreadyRunning(Exception):
    """A supervisor holds the directory."""


class MeshDirectory:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.logs = root / "logs"
        self.keys = root / "keys"
        self._pid_file = root / "mesh.pid"
        self._state_file = root / "mesh.json"
        self._held: BinaryIO | None = None

    def make(self) -> None:
        """For its owner alone. One that was there before and has other things in it keeps its mode."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.root.mkdir(mode=0o700)
        except FileExistsError:
            if self._state_file.exists() or not any(self.root.iterdir()):
                self.root.chmod(0o700)
        self.logs.mkdir(mode=0o700, exist_ok=True)

    def running(self) -> MeshState | None:
        """What runs here now; None: nothing, or it is somebody else's."""
        return self.read() if self.supervisor() else None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the supervisor here. Raises :class:`AlreadyRunning`."""
        self.make()
        with open(self._pid_file, "a+b") as file:
            for attempt in range(HOLD_ATTEMPTS):
                if _lock(file):
                    break
                if attempt + 1 == HOLD_ATTEMPTS:
                    raise AlreadyRunning(f"a mesh runs here already, under process {self.supervisor()}")
                time.sleep(HOLD_RETRY_S)
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
            file.flush()
            self._held = file
            try:
                yield
            finally:
                self._held = None
                with contextlib.suppress(OSError):
                    file.truncate(0)

    def supervisor(self) -> int:
        """Process id of the living supervisor, 0 if there is none."""
        try:
            with open(self._pid_file, "r+b") as file:
                if _lock(file):
                    return 0
                return int(file.read() or b"0")
        except (OSError, ValueError):
            return 0

    def write(self, state: MeshState) -> bool:
        """Replace what is there. False, and whoever reads it is told that it is stale, if that cannot be."""
        scratch = self._state_file.with_suffix(".new")
        try:
            scratch.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
            scratch.replace(self._state_file)
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink()
            self._mark_stale(True)
            return False
        self._mark_stale(False)
        return True

    def read(self) -> MeshState | None:
        """What the supervisor last wrote; it may have died since (see :meth:`supervisor`)."""
        try:
            state = msgspec.json.decode(self._state_file.read_bytes(), type=MeshState)
        except (OSError, msgspec.MsgspecError):
            return None
        return msgspec.structs.replace(state, stale=self._is_stale())

    def _mark_stale(self, stale: bool) -> None:
        if self._held is not None:
            wanted = fcntl.F_WRLCK if stale else fcntl.F_UNLCK
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._held, fcntl.F_OFD_SETLK, _FLOCK.pack(wanted, os.SEEK_SET, 0, 1, 0))

    def _is_stale(self) -> bool:
        try:
            with open(self._pid_file, "r+b") as file:
                asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
                (kind, *_) = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
        except OSError:
            return False
        return bool(kind != fcntl.F_UNLCK)


def _lock(file: BinaryIO) -> bool:
    """Take the lock, which goes with the file's closing; False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
