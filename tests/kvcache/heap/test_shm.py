"""What only shared memory heaps do; the rest is in test_heap_conformance.py."""

from __future__ import annotations

import os
import platform
import resource

import msgspec
import numpy as np
import pytest

from microserve.kvcache.heap import shm
from microserve.kvcache.heap.shm import ShmHeap, ShmView
from microserve.kvcache.layout import K, KvLayout
from microserve.protocol.errors import ConfigError, TransferFailed
from tests.support.kvcache.kv_samples import make_layout


@pytest.mark.parametrize("machine", ["aarch64", "riscv64"])
def test_machines_with_weaker_memory_order_are_refused(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)

    with pytest.raises(ConfigError, match=machine):
        ShmHeap(make_layout(), incarnation=1)


def test_too_little_memory_is_said_at_the_start() -> None:
    before = os.listdir("/proc/self/fd")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(ConfigError) as caught:
            ShmHeap(make_layout(num_blocks=1 << 12), incarnation=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert caught.value.field == "num_blocks"
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_name_that_fits_no_header_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        ShmHeap(make_layout(model="m" * 5000), incarnation=1)

    assert caught.value.field == "model"


def test_nobody_can_shrink_a_heap_under_its_peers() -> None:
    with ShmHeap(make_layout(), incarnation=1) as heap:
        fd = os.open(f"/proc/self/fd/{heap.address.fd}", os.O_RDWR)
        try:
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)


@pytest.mark.parametrize(
    "page",
    [b"", b"something else", b"MSERVKV1" + b"\0" * 8, b"MSERVKV1" + b"\x10" + b"\0" * 7 + b"\xc1" * 16],
)
def test_a_page_that_is_no_header_is_refused(page: bytes) -> None:
    fd = os.memfd_create("microserve-kv")
    try:
        os.write(fd, page)
        with ShmHeap(make_layout(), incarnation=1) as heap, pytest.raises(TransferFailed):
            heap.attach(msgspec.structs.replace(heap.address, fd=fd))
    finally:
        os.close(fd)


def test_a_header_that_lies_about_its_size_is_refused() -> None:
    with ShmHeap(make_layout(), incarnation=1) as heap:
        page = os.pread(heap.address.fd, 4096, 0)
        fd = os.memfd_create("microserve-kv")
        try:
            os.write(fd, page)
            with pytest.raises(TransferFailed, match="bytes"):
                heap.attach(msgspec.structs.replace(heap.address, fd=fd))
        finally:
            os.close(fd)


def test_a_refused_peer_leaves_no_descriptor() -> None:
    other = KvLayout("other", 1, 1, 1, 1, 1, "float32")
    with ShmHeap(make_layout(), incarnation=1) as heap, ShmHeap(other, incarnation=2) as stranger:
        before = os.listdir("/proc/self/fd")

        for _ in range(3):
            with pytest.raises(TransferFailed):
                heap.attach(stranger.address)

        assert os.listdir("/proc/self/fd") == before


def test_data_takes_memory_as_blocks_get_it_and_a_peer_s_mapping_takes_none() -> None:
    layout = KvLayout("tiny", 4, 2048, 16, 2, 64, "float16")
    with ShmHeap(layout, incarnation=1) as heap, ShmHeap(layout, incarnation=2) as other:

        def taken_nbytes() -> int:
            return os.fstat(heap.address.fd).st_blocks * 512

        words = taken_nbytes()
        assert words < layout.data_nbytes // 4
        with other.attach(heap.address):
            assert taken_nbytes() == words
        end = heap.back(0, 1)
        assert 1 <= end < layout.num_blocks
        backed = taken_nbytes() - words
        expected = end * layout.num_layers * layout.block_nbytes
        assert expected <= backed <= expected + layout.num_layers * 2 * 4096
        assert not heap.read_data(0, layout.block_nbytes).any()
        assert taken_nbytes() - words == backed
        assert heap.back(end, layout.num_blocks) == layout.num_blocks
        assert taken_nbytes() >= layout.data_nbytes


def test_blocks_that_get_memory_keep_what_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks share pages with their neighbours."""
    monkeypatch.setattr(shm, "BACK_NBYTES", 1)
    layout = make_layout(num_blocks=16)
    with ShmHeap(layout, incarnation=1) as heap:
        for block in range(layout.num_blocks):
            assert heap.back(block, 1) == block + 1
            for layer in range(layout.num_layers):
                content = np.full(layout.block_nbytes, block + layer + 1, np.uint8)
                heap.write_data(layout.offset(layer, block, K, 0), content)
        for block in range(layout.num_blocks):
            for layer in range(layout.num_layers):
                found = heap.read_data(layout.offset(layer, block, K, 0), layout.block_nbytes)
                assert set(found) == {block + layer + 1}


def test_a_view_of_our_own_heap_reads_stores_and_asks_as_its_owner_does() -> None:
    """Two processes of one engine: one computes in the heap, the other keeps its words."""
    layout = make_layout()
    with ShmHeap(layout, incarnation=1) as owner, ShmHeap(layout, incarnation=2) as writer:
        owner.back(0, layout.num_blocks)
        view = ShmView.open(owner.address, layout)
        view.store(3, 1 << 62)
        view.write_data(8, np.arange(4, dtype=np.uint8))
        assert owner.load(3) == 1 << 62
        assert owner.read_data(8, 4).tolist() == [0, 1, 2, 3]
        assert view.address == owner.address
        with writer.attach(view.address) as peer:
            assert peer.hold(2, 1)
            assert view.is_held(2, 1) and owner.is_held(2, 1)
            peer.let_go(2, 1)
            assert not view.is_held(2, 1)
            view.close()
            view.close()
            assert not peer.owner_is_dead(), "the owner is who made it"
            owner.close()
            assert peer.owner_is_dead()
        with pytest.raises(TransferFailed, match="gone"):
            ShmView.open(owner.address, layout)
