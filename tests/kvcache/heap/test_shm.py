"""What only shared memory heaps do; the rest is in test_heap_conformance.py."""

from __future__ import annotations

import os
import platform
import resource

import msgspec
import pytest

from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
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
