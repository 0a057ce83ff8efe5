"""Two writers and one lane of a heap whose streams run when the schedule says so.

``play`` goes through a schedule and says what promise of heap.py was broken, if one was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from hypothesis import strategies as st

from microserve.kvcache.heap.gpu.device import DeviceHeap, DevicePeerHeap
from microserve.kvcache.heap.heap import Copies, Copy
from tests.support.engine.device.host_driver import HostDriver
from tests.support.kvcache.kv_samples import data_of, make_layout, set_data

LAYOUT = make_layout(num_blocks=2, num_layers=1)
EVERYTHING = Copies(
    # Runs that do not merge, and enough of them for a launch.
    Copy((3 - number) * LAYOUT.data_nbytes // 4, number * LAYOUT.data_nbytes // 4, LAYOUT.data_nbytes // 4)
    for number in range(4)
)
NUM_ACTIONS = 8
schedules = st.lists(st.integers(0, NUM_ACTIONS - 1), min_size=10, max_size=120)

MakeHeap = Callable[[int, HostDriver], DeviceHeap]


@dataclass
class Writer:
    heap: DeviceHeap
    peer: DevicePeerHeap
    driver: HostDriver
    script: Iterator[None] = field(default_factory=lambda: iter(()))
    is_at_work: bool = False

    def work(self, numbers: Iterator[int]) -> Iterator[None]:
        """A transfer, stopped after each of its calls."""
        if not self.peer.hold(0, 0):
            return
        number = next(numbers)
        self.is_at_work = True
        set_data(self.heap, number)
        yield
        self.peer.put(EVERYTHING)
        yield
        self.peer.signal(self.peer.words.arrival(0, 0, 0), number)
        yield
        self.peer.let_go(0, 0)
        self.is_at_work = False


def play(schedule: list[int], make: MakeHeap) -> str | None:
    with ExitStack() as closing:
        owner = make(1, HostDriver())
        closing.callback(owner.close)
        writers = []
        for incarnation in (2, 3):
            driver = HostDriver()
            heap = make(incarnation, driver)
            closing.callback(heap.close)
            peer = heap.attach(owner.address)
            assert isinstance(peer, DevicePeerHeap)
            closing.callback(_leave, peer)
            writers.append(Writer(heap, peer, driver))
        numbers = iter(range(1, 251))
        arrival = owner.words.arrival(0, 0, 0)
        for action in schedule:
            writer = writers[action % 2]
            match action // 2:
                case 0:
                    if next(writer.script, writer) is writer:
                        writer.script = writer.work(numbers)
                case 1 | 2:
                    writer.driver.step(writer.peer.stream)
                case _:
                    writer.peer.poll()
            owner.poll(wait=True)
            count, data = owner.load(arrival), data_of(owner)
            if data.min() < count:
                return f"the count is {count}, the data {data.tolist()}"
            if not owner.is_held(0, 0) and any(
                writer.is_at_work or writer.driver.is_writing for writer in writers
            ):
                return "the lane is free, and a write is on its way"
    return None


def _leave(peer: DevicePeerHeap) -> None:
    peer.let_go(0, 0)
    peer.close()
