"""What puts through doors reach between two networks, against a plain stream of TCP, and what they add to KV.

    python benchmarks/heap_door.py [--rounds 5] [--seconds 1.5] [--kinds tcp nixl] [--mbit 0]

As root: makes two networks with a cable between them (tests/support/kvcache/networks.sh), which is as fast
as the machine or shaped. Ways take turns, and the medians of each round's ratio to that round's stream are
printed, so that other work on the machine disturbs them little. Where iperf3 is installed its own stream is
one of them.

    stream  1 MiB at a time from place to place of memory as large as the heap, and into such, in Python
    iperf3  its default, one stream
    tcp     prompts of 700 tokens of SmolLM2, layer by layer: KV, tags and the count of arrival
    nixl    the same

``CPU`` is what both ends took of processors, for themselves and in the kernel, in seconds for each GB: of the
end that takes more, a core is full when its rate is the reciprocal. Other work on the machine changes it
little.

``wire`` is what the sender's card counted beyond KV: frames of the door, and headers of TCP, IP and
Ethernet. A virtual cable carries segments of 64 KB in one piece; a real one has 1,500 bytes a packet, and 4
to 5 % of headers whatever is sent.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np

from microserve.kvcache.heap.doors.host import HostHeap, Opening
from microserve.kvcache.heap.heap import Copies, Copy
from microserve.kvcache.layout import K, KvLayout
from microserve.protocol.messages.kv.grant import HeapAddress

ROOT = Path(__file__).parents[1]
NETWORKS = ROOT / "tests/support/kvcache/networks.sh"
LAYOUT = KvLayout("SmolLM2-135M", 30, 512, 16, 3, 64, "bfloat16")
NUM_TOKENS = 700
CHUNK_NBYTES = 1 << 20
PORT = 5201


def make_heap(kind: str, host: str, incarnation: int) -> HostHeap:
    heap = HostHeap(LAYOUT, incarnation=incarnation, opening=Opening([kind], host, shares_memory=False))
    heap.back(0, LAYOUT.num_blocks)
    return heap


def own(kind: str, host: str) -> None:
    """In the other network, until stdin ends: a heap, or the end of a stream."""
    if kind == "stream":
        with socket.create_server((host, PORT + 1)) as server:
            print("{}", flush=True)
            buffer, at = memoryview(bytearray(LAYOUT.data_nbytes)), 0
            while True:
                connection, _ = server.accept()
                with connection:
                    while nbytes := connection.recv_into(buffer[at : at + CHUNK_NBYTES]):
                        at = (at + nbytes) % (len(buffer) - CHUNK_NBYTES)
    with make_heap(kind, host, 2) as heap:
        print(msgspec.json.encode(heap.address).decode(), flush=True)
        sys.stdin.read()


class There:
    """A process in the other network."""

    def __init__(self, *command: str) -> None:
        enter = ["nsenter", "--target", os.environ["MICROSERVE_TEST_OTHER"], "--net", "unshare", "--mount"]
        inside = ["sh", "-c", 'mount -t sysfs sysfs /sys && exec "$@"', "sh", *command]
        self.process = subprocess.Popen([*enter, *inside], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()

    def cpu_s(self) -> float:
        """Of the process and of those that it has waited for."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def stream(host: str) -> Callable[[float], tuple[int, float]]:
    buffer = memoryview(bytearray(b"\7" * LAYOUT.data_nbytes))  # written to: else it is one page of zeros

    def run(seconds: float) -> tuple[int, float]:
        with socket.create_connection((host, PORT + 1)) as connection:
            began, nbytes = time.monotonic(), 0
            while time.monotonic() - began < seconds:
                at = nbytes % (len(buffer) - CHUNK_NBYTES)
                connection.sendall(buffer[at : at + CHUNK_NBYTES])
                nbytes += CHUNK_NBYTES
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
            return nbytes, time.monotonic() - began

    return run


def iperf(host: str) -> Callable[[float], tuple[int, float]]:
    def run(seconds: float) -> tuple[int, float]:
        command = [
            "iperf3",
            "--client",
            host,
            "--port",
            str(PORT),
            "--time",
            str(max(1, round(seconds))),
            "--json",
        ]
        said = subprocess.run(command, capture_output=True, check=True).stdout
        received = msgspec.json.decode(said)["end"]["sum_received"]
        return received["bytes"], received["seconds"]

    return run


def door(kind: str, here: str, address: HeapAddress) -> Callable[[float], tuple[int, float]]:
    heap = make_heap(kind, here, 1)
    heap.data[:] = 7
    peer = heap.attach(address)
    num_blocks = LAYOUT.num_blocks_for(NUM_TOKENS)
    # Where a pool that has served for a while has room: runs of a few blocks.
    chance = np.random.default_rng(1)
    starts = chance.permutation(LAYOUT.num_blocks // 4)[: -(-num_blocks // 4)] * 4
    targets = [int(start) + step for start in starts for step in range(4)][:num_blocks]
    nbytes = LAYOUT.block_nbytes
    copies = Copies(
        Copy(LAYOUT.offset(0, source, K, 0), LAYOUT.offset(0, target, K, 0), nbytes)
        for source, target in enumerate(targets)
    )
    blocks = np.array(targets)

    def run(seconds: float) -> tuple[int, float]:
        began, sent, lane = time.monotonic(), 0, 0
        while time.monotonic() - began < seconds:
            lane = 1 - lane
            while peer.holds(0, lane):  # the prompt before the last one: an engine does not wait for the last
                peer.poll()
                time.sleep(0.001)  # nor look more often
            if not peer.hold(0, lane):
                raise RuntimeError("the lane is held")
            for layer in range(LAYOUT.num_layers):
                peer.put(copies, layer * LAYOUT.layer_nbytes, layer * LAYOUT.layer_nbytes)
                peer.signal_each(peer.words.tags(layer, blocks), 1)
                peer.signal(peer.words.arrival(0, lane, layer), 1)
                sent += copies.nbytes
            peer.let_go(0, lane)
        peer.poll(wait=True)
        return sent, time.monotonic() - began

    return run


def own_cpu_s() -> float:
    """Of this process and of those that it has waited for (iperf3)."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def card_nbytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "heap-a":
            return int(counts.split()[8])
    raise RuntimeError("no card")


def shape(mbit: float) -> None:
    if mbit:
        rate = ["rate", f"{mbit:g}mbit", "burst", "64kb", "latency", "100ms"]
        subprocess.run(["tc", "qdisc", "add", "dev", "heap-a", "root", "tbf", *rate], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--kinds", nargs="*", default=["tcp", *(["nixl"] if find_spec("nixl") else [])])
    parser.add_argument("--mbit", type=float, default=0.0, help="0: as fast as the machine")
    parser.add_argument("--own", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.own:
        own(*arguments.own)
        return
    if "MICROSERVE_TEST_OTHER" not in os.environ:
        if os.geteuid() != 0:
            sys.exit("Error: networks need root")
        os.execvp("sh", ["sh", str(NETWORKS), sys.executable, *sys.argv])

    here, there = os.environ["MICROSERVE_TEST_DOOR_HOST"], os.environ["MICROSERVE_TEST_OTHER_HOST"]
    shape(arguments.mbit)
    others = {"stream": There(sys.executable, __file__, "--own", "stream", there)}
    ways = {"stream": stream(there)}
    if shutil.which("iperf3"):
        others["iperf3"] = There("sh", "-c", f"echo; exec iperf3 --server --port {PORT} >/dev/null")
        ways["iperf3"] = iperf(there)
    for kind in arguments.kinds:
        others[kind] = There(sys.executable, __file__, "--own", kind, there)
        ways[kind] = door(kind, here, msgspec.json.decode(others[kind].said, type=HeapAddress))
    try:
        rates: dict[str, list[float]] = {name: [] for name in ways}
        extra: dict[str, list[float]] = {name: [] for name in ways}
        here_cpu, there_cpu = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
        total = dict.fromkeys(ways, 0)
        for run in ways.values():
            run(0.3)
        for _ in range(arguments.rounds):
            for name, run in ways.items():
                before, here_before, there_before = card_nbytes(), own_cpu_s(), others[name].cpu_s()
                nbytes, seconds = run(arguments.seconds)
                here_cpu[name] += own_cpu_s() - here_before
                there_cpu[name] += others[name].cpu_s() - there_before
                total[name] += nbytes
                rates[name].append(nbytes / seconds)
                extra[name].append((card_nbytes() - before) / nbytes - 1)
    finally:
        for other in others.values():
            other.end()
    print(f"{'':8} {'MB/s':>8} {'of stream':>10} {'wire':>8} {'CPU here':>9} {'there':>6}")
    for name in ways:
        ratio = statistics.median(one / base for one, base in zip(rates[name], rates["stream"], strict=True))
        rate, more = statistics.median(rates[name]) / 1e6, statistics.median(extra[name])
        cpu = here_cpu[name] / total[name] * 1e9, there_cpu[name] / total[name] * 1e9
        print(f"{name:8} {rate:8.0f} {ratio:9.0%} {more:8.2%} {cpu[0]:9.2f} {cpu[1]:6.2f}")


if __name__ == "__main__":
    main()
