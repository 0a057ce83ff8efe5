"""Puts by one launch: the kernel's own address code, run when the stream of a stand-in driver comes to it."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kernels.cuda_module import Launch
from microserve.kernels.scatter.block_put import PutPlan
from microserve.kvcache.grant.writer import LaneWriter, TransferPlan
from microserve.kvcache.heap.gpu import kernel_put
from microserve.kvcache.heap.gpu.cuda_ipc import CudaIpcHeap
from microserve.kvcache.heap.gpu.device import MIN_RUNS_OF_A_LAUNCH, DeviceHeap
from microserve.kvcache.heap.gpu.kernel_put import KernelPut
from microserve.kvcache.heap.heap import Copies, Copy
from microserve.kvcache.words import OPEN, pack_state
from microserve.protocol.errors import InternalError, MeshError
from microserve.protocol.messages.kv.grant import Grant
from tests.support.engine.device.host_driver import HostDriver, host_address
from tests.support.engine.device.host_world import HostWorld
from tests.support.engine.device.kernel_cases import declared, emulate
from tests.support.kvcache.heap.device_schedules import LAYOUT, play, schedules
from tests.support.kvcache.heap.nvshmem_ranks import make_heap
from tests.support.kvcache.kv_samples import data_of, fill, make_layout, mismatches

PLACES = {name: place for place, (_, name) in enumerate(declared("block_put"))}
CPU = torch.device("cpu")


class HostLaunches:
    """Launches become work of a HostDriver's stream, as they do of a device's."""

    def __init__(self, kernels: ctypes.CDLL, driver: HostDriver) -> None:
        self._kernels = kernels
        self._driver = driver
        self.num_launches = 0
        self.tables: set[int] = set()

    def __call__(self, launch: Launch, stream: int) -> None:
        self.num_launches += 1
        arguments = list(launch.arguments)
        for name in ("source", "target"):
            arguments[PLACES[name]] = np.uint64(host_address(int(arguments[PLACES[name]])))
        # The table is memory in the stream's order: what is freed now is there for work that is enqueued.
        table, num_ranges = int(arguments[PLACES["ranges"]]), int(arguments[PLACES["num_ranges"]])
        self.tables.add(table)
        held = np.array((ctypes.c_int64 * (3 * num_ranges)).from_address(table))
        arguments[PLACES["ranges"]] = np.uint64(held.ctypes.data)
        work = replace(launch, arguments=tuple(arguments))
        self._driver.launch(stream, partial(self._run, work, held))

    def _run(self, launch: Launch, held: object) -> None:
        emulate(self._kernels.emulate_put, launch)


class Pair:
    def __init__(self, kernels: ctypes.CDLL) -> None:
        self.driver = HostDriver()
        self.launches = HostLaunches(kernels, self.driver)
        put = KernelPut(CPU, enqueue=self.launches)
        self.writer = CudaIpcHeap(
            make_layout(), incarnation=1, driver=self.driver, num_slots=1, block_put=put
        )
        self.owner = CudaIpcHeap(make_layout(num_blocks=9), incarnation=2, driver=HostDriver(), num_slots=1)
        self.peer = self.writer.attach(self.owner.address)


@pytest.fixture
def pair(host_kernels: ctypes.CDLL) -> Iterator[Pair]:
    pair = Pair(host_kernels)
    yield pair
    pair.peer.close()
    pair.writer.close()
    pair.owner.close()


def test_scattered_blocks_of_every_layer_arrive_by_one_launch_each(pair: Pair) -> None:
    layout, num_tokens = pair.writer.layout, 5 * make_layout().block_size + 1
    blocks, theirs = [6, 1, 4, 0, 7, 2], [8, 3, 0, 6, 1, 5]
    fill(pair.writer, blocks, num_tokens, seed=4)
    grant = Grant(
        *("g", "e", 2, 0, 1, 0, num_tokens, theirs, layout.block_size, layout.layout_hash),
        *(pair.owner.address, 1.0),
    )
    copies = TransferPlan(layout, pair.owner.layout, grant, 0, num_tokens).copies(blocks, 0, num_tokens)
    for layer in range(layout.num_layers):
        pair.peer.put(copies, layer * layout.layer_nbytes, layer * pair.owner.layout.layer_nbytes)
    pair.peer.signal(0, 1)
    assert pair.launches.num_launches == layout.num_layers
    assert len(pair.launches.tables) == 1
    assert not data_of(pair.owner).any()

    pair.peer.poll(wait=True)
    assert mismatches(pair.owner, theirs, 0, 0, num_tokens, seed=4) == []


def test_a_layer_of_a_transfer_is_three_operations_however_scattered(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch, the tags, the arrival: the step's thread enqueues no more, for 6 blocks or 600."""
    layout, num_tokens = pair.writer.layout, 5 * make_layout().block_size + 1
    grant = Grant(
        *("g", "e", 2, 0, 1, 0, num_tokens, [8, 3, 0, 6, 1, 5], layout.block_size, layout.layout_hash),
        *(pair.owner.address, 1.0),
    )
    pair.owner.store(pair.owner.words.state(0), pack_state(1, OPEN))
    writer = LaneWriter(pair.writer, pair.peer, grant, 0, 0, num_tokens)
    writer.claim()
    operations: list[str] = []
    for name in ("copy", "write_values", "launch"):
        original = getattr(pair.driver, name)

        def counted(*arguments: Any, name: str = name, original: Any = original, **options: Any) -> None:
            operations.append(name)
            original(*arguments, **options)

        monkeypatch.setattr(pair.driver, name, counted)
    writer.put_layer(0, [6, 1, 4, 0, 7, 2], 0, num_tokens)

    assert operations == ["launch", "write_values", "write_values"]
    writer.finish()


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=9), gap=st.integers(0, 3), data=st.data())
def test_any_runs_arrive_and_nothing_beside_them(
    host_kernels: ctypes.CDLL, lengths: list[int], gap: int, data: st.DataObject
) -> None:
    pair = Pair(host_kernels)
    with pair.owner, pair.writer, pair.peer:
        starts = [0, *itertools.accumulate(nbytes + gap for nbytes in lengths)]
        order = data.draw(st.permutations(range(len(lengths))))
        sources = [0, *itertools.accumulate(lengths[index] for index in order)]
        copies = Copies(
            Copy(sources[place], starts[index], lengths[index]) for place, index in enumerate(order)
        )
        content = np.random.default_rng(1).integers(1, 256, pair.writer.layout.data_nbytes, dtype=np.uint8)
        pair.writer.write_data(0, content)
        expected = np.zeros(pair.owner.layout.data_nbytes, np.uint8)
        for copy in copies.copies:
            expected[copy.target : copy.target + copy.nbytes] = content[copy.source :][: copy.nbytes]
        pair.peer.put(copies)
        pair.peer.poll(wait=True)

        assert (data_of(pair.owner) == expected).all()
        assert bool(pair.launches.num_launches) == (len(copies.copies) >= MIN_RUNS_OF_A_LAUNCH)


def test_runs_outside_of_a_region_are_refused_before_any_launch(pair: Pair) -> None:
    nbytes = pair.writer.layout.data_nbytes
    runs = Copies(Copy(64 * (9 - number), 64 * number, 8) for number in range(9))
    with pytest.raises(InternalError):
        pair.peer.put(runs, source_shift=nbytes - 500)
    with pytest.raises(InternalError):
        pair.peer.put(runs, target_shift=pair.owner.layout.data_nbytes - 500)
    assert pair.launches.num_launches == 0


def test_a_grant_that_names_a_block_twice_ends_its_send_and_not_the_step(pair: Pair) -> None:
    """The step passes over refusals of a send (MeshError); anything else ends the engine."""
    layout = pair.writer.layout
    theirs = [8, 3, 0, 6, 3]
    grant = Grant(
        *("g", "e", 2, 0, 1, 0, 5 * layout.block_size, theirs, layout.block_size, layout.layout_hash),
        *(pair.owner.address, 1.0),
    )
    with pytest.raises(MeshError):
        plan = TransferPlan(layout, pair.owner.layout, grant, 0, grant.end)
        pair.peer.put(plan.copies([6, 1, 4, 0, 7], 0, grant.end))
    assert pair.launches.num_launches == 0


def test_runs_go_one_by_one_where_the_device_has_no_room_for_their_table(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch takes memory of its own for each stream. The step must not end for want of it."""

    def full(*_: object) -> PutPlan:
        raise torch.OutOfMemoryError("CUDA out of memory")

    content = np.random.default_rng(1).integers(1, 256, pair.writer.layout.data_nbytes, dtype=np.uint8)
    pair.writer.write_data(0, content)
    runs = Copies(Copy(64 * (9 - number), 64 * number, 64) for number in range(9))
    with monkeypatch.context() as patch:
        patch.setattr(kernel_put, "put_plan", full)
        pair.peer.put(runs)
    pair.peer.poll(wait=True)
    assert pair.launches.num_launches == 0
    for copy in runs.copies:
        assert (data_of(pair.owner)[copy.target :][:64] == content[copy.source :][:64]).all()

    pair.peer.put(runs)
    assert pair.launches.num_launches == 1


def test_each_stream_has_a_table_of_its_own(pair: Pair) -> None:
    """A stream's work may come before another's upload."""
    runs = Copies(Copy(64 * (9 - number), 64 * number, 8) for number in range(9))
    with pair.writer.attach(pair.owner.address) as other:
        pair.peer.put(runs)
        other.put(runs)
        pair.peer.put(runs, 8, 8)
        assert len(pair.launches.tables) == 2


@settings(max_examples=150, deadline=None)
@given(schedules)
def test_no_count_overtakes_a_launch(host_kernels: ctypes.CDLL, schedule: list[int]) -> None:
    def make(incarnation: int, driver: HostDriver) -> DeviceHeap:
        put = KernelPut(CPU, enqueue=HostLaunches(host_kernels, driver))
        return CudaIpcHeap(LAYOUT, incarnation=incarnation, driver=driver, num_slots=1, block_put=put)

    assert play(schedule, make) is None


@settings(max_examples=100, deadline=None)
@given(schedules)
def test_no_count_overtakes_a_launch_into_symmetric_memory(
    host_kernels: ctypes.CDLL, schedule: list[int]
) -> None:
    world = HostWorld(num_ranks=3)

    def make(incarnation: int, driver: HostDriver) -> DeviceHeap:
        put = KernelPut(CPU, enqueue=HostLaunches(host_kernels, driver))
        return make_heap(world, incarnation, driver=driver, layout=LAYOUT, block_put=put)

    assert play(schedule, make) is None
