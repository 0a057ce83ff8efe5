"""What strangers can cost a service before they are cut: memory under floods that libzmq knows no bound of.

    python tests/support/security/flood.py [--seconds 6] [--setting bus.insecure=true ...]

prints the memory of an index under each flood, and whether a peer that means well was served meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tests.support.process.processes import MeshProcesses

MIB = 1 << 20
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00"
CHUNK = bytes(MIB)


def greeting(mechanism: bytes) -> bytes:
    """ZMTP 3.0's first 64 bytes, of a client."""
    return GREETING + mechanism.ljust(20, b"\0") + bytes(32)


READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
Flood = Callable[[socket.socket, float], None]


def connect(address: str) -> socket.socket:
    url = urlsplit(address)
    return socket.create_connection((url.hostname or "", url.port or 0), timeout=5.0)


def unfinished_handshake(connection: socket.socket, until: float) -> None:
    """A first command as long as a frame may have been, which never ends."""
    connection.sendall(greeting(b"CURVE") + b"\x06" + struct.pack(">Q", 60 * MIB))
    _pour(connection, CHUNK, until)


def shorter_handshake(connection: socket.socket, until: float) -> None:
    """One as long as a frame may be now, which stops one byte before its end."""
    connection.sendall(greeting(b"CURVE") + b"\x06" + struct.pack(">Q", 8 * MIB - 1) + CHUNK * 7)
    connection.sendall(CHUNK[2:])
    idle(connection, until)


def unfinished_message(connection: socket.socket, until: float) -> None:
    """Frame after frame of one message, none of them the last (without keys)."""
    connection.sendall(greeting(b"NULL") + READY)
    connection.recv(64)
    _pour(connection, b"\x03" + struct.pack(">Q", MIB) + CHUNK, until)


def unfinished_small_frames(connection: socket.socket, until: float) -> None:
    """The same in the smallest frames, each of which costs libzmq 64 bytes."""
    connection.sendall(greeting(b"NULL") + READY)
    connection.recv(64)
    _pour(connection, b"\x01\x01x" * (MIB // 3), until)


def _pour(connection: socket.socket, chunk: bytes, until: float) -> None:
    while time.monotonic() < until:
        connection.sendall(chunk)


def idle(connection: socket.socket, until: float) -> None:
    """Says nothing at all."""
    connection.settimeout(max(0.1, until - time.monotonic()))
    while connection.recv(64):
        pass


def _attack(address: str, flood: Flood, until: float) -> None:
    """Again as soon as it is cut."""
    while time.monotonic() < until:
        with contextlib.suppress(OSError), contextlib.closing(connect(address)) as connection:
            flood(connection, until)


def peak_nbytes(pid: int, address: str, flood: Flood, *, num_connections: int, seconds: float) -> int:
    """The most memory that the process had beyond what it had before."""
    process = psutil.Process(pid)
    before = peak = process.memory_info().rss
    until = time.monotonic() + seconds
    attackers = [
        threading.Thread(target=_attack, args=(address, flood, until), daemon=True)
        for _ in range(num_connections)
    ]
    for each in attackers:
        each.start()
    while any(each.is_alive() for each in attackers):
        peak = max(peak, process.memory_info().rss)
        attackers[0].join(0.01)
    return peak - before


@contextlib.contextmanager
def index_process(directory: Path, settings: list[str]) -> Iterator[tuple[int, str]]:
    """Process id and address of an index that runs with ``settings``."""
    mesh = MeshProcesses(Path("none"), directory, settings=settings)
    service = mesh.start("index")
    try:
        yield service.process.pid, mesh.index_address
    finally:
        mesh.stop("index")


FLOODS: list[tuple[str, Flood, int, bool]] = [
    ("30 handshakes that are never finished", unfinished_handshake, 30, True),
    ("300 of them, as long as may be", shorter_handshake, 300, True),
    ("one message that is never finished", unfinished_message, 1, False),
    ("the same in frames of one byte", unfinished_small_frames, 1, False),
    ("30 of them", unfinished_small_frames, 30, False),
]


def main() -> None:
    from microserve.protocol.bus.curve import create_keys

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--setting", action="append", default=[])
    options = parser.parse_args()
    for name, flood, num_connections, has_keys in FLOODS:
        with tempfile.TemporaryDirectory() as scratch:
            keys = Path(scratch) / "keys"
            create_keys(keys)
            settings = [f"bus.curve_dir={keys}"] if has_keys else options.setting
            with index_process(Path(scratch), settings) as (pid, address):
                peak = peak_nbytes(
                    pid, address, flood, num_connections=num_connections, seconds=options.seconds
                )
        print(f"{name:<42}{peak / MIB:>8.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
