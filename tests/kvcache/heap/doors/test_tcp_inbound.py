"""What a writer sends, in pieces of any size, comes into the heap as it was meant, or not at all."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kvcache.heap.doors.tcp import frames
from microserve.kvcache.heap.doors.tcp.inbound import Frame, Inbound, SignalEach
from microserve.protocol.errors import ProtocolViolation

NUM_WORDS, NUM_LANES = 100, 12
DATA_NBYTES = 20_000

spans = st.lists(
    st.tuples(st.integers(0, 2_000), st.integers(0, DATA_NBYTES - 3_000), st.integers(1, 3_000)),
    min_size=1,
    max_size=5,
)
words = st.integers(0, NUM_WORDS - 1)
values = st.integers(0, (1 << 64) - 1)
sendings = st.one_of(
    st.tuples(st.just("put"), spans),
    st.tuples(st.just("signal"), words, values),
    st.tuples(st.just("each"), st.lists(words, max_size=20), values),
    st.tuples(st.sampled_from([frames.HOLD, frames.LET_GO]), st.integers(0, NUM_LANES - 1)),
    st.tuples(st.sampled_from([frames.READ]), words),
    st.tuples(st.sampled_from([frames.SYNC, frames.BEAT]), st.integers(0, 99)),
)


class World:
    """A heap and its writer's data; what has been applied, and in which state the heap then was."""

    def __init__(self) -> None:
        self.source = random.Random(1).randbytes(5_000)
        self.data = bytearray(DATA_NBYTES)
        self.inbound = Inbound(memoryview(self.data), NUM_WORDS, NUM_LANES)
        self.seen: list[tuple[Any, bytes]] = []

    def feed(self, some: bytes) -> None:
        """As ``recvmsg_into`` does."""
        while some:
            left = len(some)
            for buffer in self.inbound.buffers():
                count = min(len(buffer), len(some))
                buffer[:count] = some[:count]
                some = some[count:]
            for frame in self.inbound.received(left - len(some)):
                plain = (frame.words.tolist(), frame.value) if isinstance(frame, SignalEach) else tuple(frame)
                self.seen.append((plain, bytes(self.data)))


@settings(deadline=None)
@given(st.lists(sendings, max_size=12), st.data())
def test_frames_come_in_order_behind_the_bytes_before_them(sent: list[Any], data: st.DataObject) -> None:
    """Whatever the network makes of them, and wherever it cuts."""
    world, expected = World(), bytearray(DATA_NBYTES)
    stream = b""
    awaited: list[tuple[Any, bytes]] = []
    for kind, *what in sent:
        if kind == "put":
            for frame in frames.put_frames(what[0], memoryview(world.source)):
                stream += b"".join(frame)
            for source, target, nbytes in what[0]:
                expected[target : target + nbytes] = world.source[source : source + nbytes]
        elif kind == "signal":
            stream += frames.head(frames.SIGNAL, *what)
            awaited.append(((frames.SIGNAL, *what), bytes(expected)))
        elif kind == "each":
            stream += b"".join(frames.signal_each_frames(np.array(what[0], np.int64), what[1]))
            if what[0]:
                awaited.append(((what[0], what[1]), bytes(expected)))
        else:
            stream += frames.head(kind, what[0])
            awaited.append(((kind, what[0], 0), bytes(expected)))

    while stream:
        count = data.draw(st.integers(1, len(stream)) | st.integers(1, min(len(stream), 40)))
        world.feed(stream[:count])
        stream = stream[count:]

    assert world.inbound.is_between_frames
    assert bytes(world.data) == expected
    # A later put may be here before an earlier frame is looked at; what came before the frame is, always.
    assert [plain for plain, _ in world.seen] == [plain for plain, _ in awaited]


def test_no_frame_is_seen_before_the_bytes_that_came_before_it() -> None:
    world = World()
    [put] = frames.put_frames([(0, 100, 300)], memoryview(world.source))
    stream = b"".join(put) + frames.head(frames.SIGNAL, 7, 1)
    for place in range(len(stream)):
        world.feed(stream[place : place + 1])
        assert not world.seen or place == len(stream) - 1
    [(frame, data)] = world.seen
    assert frame == (frames.SIGNAL, 7, 1)
    assert data[100:400] == world.source[:300]


def _put(*targets: tuple[int, int], total: int | None = None) -> bytes:
    nbytes = sum(nbytes for _, nbytes in targets) if total is None else total
    table = b"".join(frames.SPAN.pack(*target) for target in targets)
    return frames.head(frames.PUT, len(targets), nbytes) + table


@pytest.mark.parametrize(
    "hostile",
    [
        _put((DATA_NBYTES, 1)),
        _put((DATA_NBYTES - 1, 2)),
        _put(((1 << 64) - 1, 2)),
        _put((0, 0)),
        _put((0, frames.MAX_PUT_NBYTES + 1)),
        _put((0, 8), (8, 8), total=17),
        _put((0, 8), total=(1 << 64) - 1),
        frames.head(frames.PUT, 0, 0),
        frames.head(frames.PUT, frames.MAX_SPANS + 1, 1),
        frames.head(frames.PUT, (1 << 32) - 1, 1),
        frames.head(frames.SIGNAL_EACH, frames.MAX_WORDS + 1, 1),
        frames.head(frames.SIGNAL_EACH, 1, 1) + np.array([NUM_WORDS], frames.WORD).tobytes(),
        frames.head(frames.SIGNAL, NUM_WORDS, 1),
        frames.head(frames.READ, NUM_WORDS),
        frames.head(frames.HOLD, NUM_LANES),
        frames.head(frames.LET_GO, (1 << 32) - 1),
        frames.head(frames.HELD, 0),
        frames.head(frames.TORN, 0),
        frames.head(0),
        frames.head(255),
    ],
)
def test_what_breaks_a_bound_is_refused_before_its_first_byte(hostile: bytes) -> None:
    world = World()
    with pytest.raises(ProtocolViolation):
        world.feed(hostile + bytes(64))

    assert bytes(world.data) == bytes(DATA_NBYTES)
    assert world.seen == []


@given(st.binary(max_size=400))
def test_garbage_is_refused_or_is_frames(some: bytes) -> None:
    world = World()
    try:
        world.feed(some)
    except ProtocolViolation:
        return
    assert len(world.seen) <= len(some) // frames.HEAD.size


def test_frames_are_what_they_were() -> None:
    """Golden: two versions of a mesh talk to each other."""
    source = memoryview(b"keys and values")
    [put] = frames.put_frames([(0, 0x1122, 4), (9, 0x3344, 6)], source)
    assert (
        b"".join(put).hex()
        == ("01000000020000000a00000000000000221100000000000004000000443300000000000006000000")
        + b"keysvalues".hex()
    )
    assert frames.head(frames.SIGNAL, 5, 1 << 62).hex() == "02000000050000000000000000000040"
    [each] = frames.signal_each_frames(np.array([1, 258]), 7)
    assert each.hex() == "030000000200000007000000000000000100000002010000"
    kinds = [frames.HOLD, frames.LET_GO, frames.READ, frames.SYNC, frames.BEAT]
    assert kinds == [4, 5, 6, 7, 8]
    kinds = [frames.HELD, frames.BUSY, frames.FREE, frames.VALUE, frames.SYNCED, frames.STATE, frames.TORN]
    assert kinds == [33, 34, 35, 36, 37, 38, 39]


def test_a_put_of_any_size_is_cut() -> None:
    """So that what is urgent waits for half a megabyte at most."""
    nbytes = 3 * frames.MAX_PUT_NBYTES + 5
    source = memoryview(bytes(nbytes))
    cut = list(frames.put_frames([(0, 64, nbytes)], source))
    assert [sum(map(len, parts[1:])) for parts in cut] == [frames.MAX_PUT_NBYTES] * 3 + [5]
    many = list(frames.put_frames([(n, n, 1) for n in range(2 * frames.MAX_SPANS + 1)], source))
    assert [len(parts) - 1 for parts in many] == [frames.MAX_SPANS, frames.MAX_SPANS, 1]
    assert isinstance(Frame(1, 2, 3), tuple)
