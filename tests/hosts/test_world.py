"""The hosts themselves: apart as hosts are, cables that do as they are told, nothing left of any."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.hosts.world import SUBNET, World

PORT = 5000


def listen(world: World, name: str) -> socket.socket:
    with world[name].inside.joined():
        return socket.create_server((world[name].address, PORT))


@contextlib.contextmanager
def sink(world: World, name: str) -> Iterator[None]:
    """Whoever connects to the host may send what he likes."""
    listener = listen(world, name)

    def take() -> None:
        with contextlib.suppress(OSError):
            while True:
                with listener.accept()[0] as taken:
                    while taken.recv(1 << 16):
                        pass

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    yield
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


def connect(world: World, source: str, target: str, timeout_s: float = 10.0) -> socket.socket:
    with world[source].inside.joined():
        return socket.create_connection((world[target].address, PORT), timeout=timeout_s)


def test_hosts_share_neither_processes_nor_memory_nor_settings(world: World) -> None:
    boot_ids = {host.inside.do("cat", "/proc/sys/kernel/random/boot_id") for host in world.hosts.values()}
    assert len(boot_ids) == 3
    names = [host.inside.do("hostname").strip() for host in world.hosts.values()]
    assert names == ["front", "e0", "e1"]
    one, other = world["e0"].inside, world["e1"].inside
    held = one.start(["sleep", "1000"])
    assert f"/{held.pid}/" not in one.do("sh", "-c", "echo /proc/*/"), "by a number of its own"
    for path in ("/dev/shm/mark", "/etc/mark", "/srv/mark", "/var/lib/mark"):
        one.do("touch", path)
        assert other.run("ls", path).returncode != 0
        assert not Path(path).exists()
    seen = [int(each) for each in other.do("sh", "-c", "cd /proc; echo [0-9]*").split()]
    assert len(seen) <= 3, "its first process, the shell"
    held.kill()
    held.wait(10)


def test_two_containers_of_one_machine_have_one_kernel(tmp_path: Path) -> None:
    with World(tmp_path, one_kernel=True) as world:
        boot_ids = {host.inside.do("cat", "/proc/sys/kernel/random/boot_id") for host in world.hosts.values()}
        assert boot_ids == {Path("/proc/sys/kernel/random/boot_id").read_text()}
        assert len({host.inside.do("readlink", "/proc/self/ns/pid") for host in world.hosts.values()}) == 3


def test_a_cable_that_is_cut_carries_nothing_until_it_is_healed(world: World) -> None:
    with sink(world, "e0"), sink(world, "e1"):
        connect(world, "front", "e0").close()
        world.cut("e0")
        with pytest.raises(OSError, match=r"timed out|No route"):
            connect(world, "front", "e0", 0.5)
        connect(world, "front", "e1").close()
        world.heal()
        connect(world, "front", "e0").close()


def test_one_way_is_lost_and_the_other_is_not(world: World) -> None:
    world.lose("e0", "front")
    with world["e0"].inside.joined():
        hears = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        hears.bind((world["e0"].address, PORT))
    with world["front"].inside.joined():
        speaks = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        speaks.bind((world.front.address, PORT))
    with hears, speaks:
        hears.settimeout(10)
        speaks.settimeout(0.5)
        speaks.sendto(b"there", (world["e0"].address, PORT))
        assert hears.recv(16) == b"there"
        hears.sendto(b"back", (world.front.address, PORT))
        with pytest.raises(TimeoutError):
            speaks.recv(16)
        world.heal()
        speaks.settimeout(10)
        hears.sendto(b"again", (world.front.address, PORT))
        assert speaks.recv(16) == b"again"


@pytest.mark.slow
@pytest.mark.parametrize("mbit_s", [10, 100])
def test_a_slow_cable_is_as_slow_as_it_is_told(world: World, mbit_s: int) -> None:
    """Never faster; how much slower is this machine's business."""
    nbytes = mbit_s * 250_000  # two seconds of it
    with sink(world, "e0"), connect(world, "front", "e0") as connection:
        world.slow("e0", mbit_s)
        before = world["e0"].traffic().received_nbytes
        began = time.monotonic()
        connection.sendall(bytes(nbytes))
        while (come := world["e0"].traffic().received_nbytes - before) < nbytes:
            assert time.monotonic() - began < 60
        took_s = time.monotonic() - began
    assert come * 8e-6 / took_s <= mbit_s * 1.1


def test_a_host_that_vanishes_says_nothing_and_comes_back_anew(world: World) -> None:
    with listen(world, "e1"), connect(world, "e0", "e1") as kept:
        runs = world["e1"].inside.start(["sleep", "1000"])
        boot_id = world["e1"].inside.do("cat", "/proc/sys/kernel/random/boot_id")
        world.vanish("e1")
        assert runs.wait(10) == -signal.SIGKILL
        kept.setblocking(False)
        with pytest.raises(BlockingIOError):
            kept.recv(1)
    world.come_back("e1")
    assert world["e1"].inside.do("cat", "/proc/sys/kernel/random/boot_id") != boot_id
    with sink(world, "e1"):
        connect(world, "e0", "e1").close()


KILLED = """
import pathlib, sys, tempfile
from tests.support.hosts.world import World
world = World(pathlib.Path(sys.argv[1]))
world["e0"].inside.start(["sleep", "1000"])
print(*(host.inside.first for host in world.hosts.values()), flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_when_whoever_made_them_is_killed(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, sys.path)])
    maker = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    )
    with maker:
        assert maker.stdout is not None
        first = [int(each) for each in maker.stdout.readline().split()]
        assert len(first) == 3
        network = {os.readlink(f"/proc/{pid}/ns/net") for pid in first}
        maker.kill()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in first):
        assert time.monotonic() < deadline, "a host outlives its maker"
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            assert os.readlink(f"/proc/{process.pid}/ns/net") not in network
    assert SUBNET not in Path("/proc/net/fib_trie").read_text(), "no address of theirs was ever the machine's"
