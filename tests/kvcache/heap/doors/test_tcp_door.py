"""What a door of TCP owes to its heap: strangers cost nothing, and nothing comes in late."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import msgspec
import pytest

from microserve.kvcache.heap.doors.door import Entrance
from microserve.kvcache.heap.doors.host import HostHeap
from microserve.kvcache.heap.doors.tcp import door, frames, greeting
from microserve.kvcache.heap.doors.tcp import peer as peer_module
from microserve.kvcache.heap.doors.tcp.peer import TcpPeerHeap
from microserve.kvcache.heap.heap import Copies, Copy, PeerHeap
from microserve.protocol.errors import TransferFailed
from tests.support.kvcache.heap.door_heaps import door_of
from tests.support.kvcache.heap.heap_child import Child, wait_until
from tests.support.kvcache.heap.heap_factories import OTHERS, THEIRS, lose_patience
from tests.support.kvcache.kv_samples import POISON_BYTE, data_of, set_data, settle

pytestmark = pytest.mark.slow


def connect(heap: HostHeap) -> socket.socket:
    host, port = msgspec.msgpack.decode(door_of(heap).door, type=Entrance).where.decode().split(":")
    connection = socket.create_connection((host, int(port)), 30)
    connection.settimeout(30)
    return connection


def hello(heap: HostHeap, connection: socket.socket, **change: object) -> bytes:
    address = door_of(heap)
    entrance = msgspec.msgpack.decode(address.door, type=Entrance)
    entrance = msgspec.structs.replace(entrance, **{k: v for k, v in change.items() if k == "secret"})
    address = msgspec.structs.replace(address, **{k: v for k, v in change.items() if k != "secret"})
    got = connection.recv(greeting.GREETING_NBYTES, socket.MSG_WAITALL)
    return greeting.WriterGreeting(address, entrance).hello(got)


def is_closed(connection: socket.socket) -> bool:
    """After all that it said; never, by a timeout that fails the test."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


# --- who may come in -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"secret": bytes(32)}, {"secret": b""}, {"incarnation": OTHERS}, {"pid": 1}]
)
def test_who_does_not_know_it_is_let_go(heap: HostHeap, change: dict[str, object]) -> None:
    with connect(heap) as stranger:
        stranger.sendall(hello(heap, stranger, **change))
        assert is_closed(stranger)


@pytest.mark.parametrize("some", [b"GET / HTTP/1.1\r\nHost: door\r\n\r\n" * 3, bytes(4096), b"\xff" * 4096])
def test_garbage_at_the_door_is_let_go(heap: HostHeap, writer: HostHeap, some: bytes) -> None:
    with connect(heap) as stranger:
        stranger.sendall(some)
        assert is_closed(stranger)
    with writer.attach(door_of(heap)) as peer:
        assert peer.hold(0, 0)
        peer.let_go(0, 0)


def test_a_proof_is_good_for_one_connection(heap: HostHeap) -> None:
    with connect(heap) as first, connect(heap) as second:
        known = hello(heap, first)
        first.sendall(known)
        assert len(first.recv(greeting.WELCOME_NBYTES, socket.MSG_WAITALL)) == greeting.WELCOME_NBYTES
        second.recv(greeting.GREETING_NBYTES, socket.MSG_WAITALL)
        second.sendall(known)
        assert is_closed(second)


def test_an_impostor_gets_nothing(heap: HostHeap, writer: HostHeap) -> None:
    """It listens at a door's address and does not know the door's secret."""
    address = door_of(heap)
    entrance = msgspec.msgpack.decode(address.door, type=Entrance)
    lie = msgspec.structs.replace(entrance, secret=os.urandom(32))
    with pytest.raises(TransferFailed, match="out of reach"):
        writer.attach(msgspec.structs.replace(address, door=msgspec.msgpack.encode(lie)))

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        elsewhere = msgspec.structs.replace(entrance, where=f"127.0.0.1:{port}".encode())
        packed = msgspec.msgpack.encode(elsewhere)
        server.listen()
        pid = os.fork()
        if pid == 0:  # answers with a greeting, and with a welcome of zeros
            connection, _ = server.accept()
            connection.sendall(greeting.MAGIC + bytes(greeting.NONCE_NBYTES))
            connection.recv(greeting.HELLO_NBYTES, socket.MSG_WAITALL)
            connection.sendall(bytes(greeting.WELCOME_NBYTES))
            os._exit(0)
        with pytest.raises(TransferFailed, match="does not know its secret"):
            writer.attach(msgspec.structs.replace(address, fd=port, door=packed))
        os.waitpid(pid, 0)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(["a"]),
        msgspec.msgpack.encode([b"s", b"x"]),
        msgspec.msgpack.encode([b"s", b"no..name:1"]),
    ],
)
def test_an_address_that_does_not_decode_is_refused(heap: HostHeap, writer: HostHeap, packed: bytes) -> None:
    with pytest.raises(TransferFailed, match="does not decode"):
        writer.attach(msgspec.structs.replace(door_of(heap), door=packed))


def test_strangers_who_say_nothing_keep_nobody_out(
    heap: HostHeap, writer: HostHeap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MAX_STRANGERS", 4)
    strangers = [connect(heap) for _ in range(12)]
    try:
        with writer.attach(door_of(heap)) as peer:
            assert peer.hold(0, 0)
            peer.let_go(0, 0)
        # The oldest have made room.
        assert is_closed(strangers[0])
    finally:
        for stranger in strangers:
            stranger.close()


def test_no_more_writers_than_there_is_room_for(
    heap: HostHeap, writer: HostHeap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door.TcpDoor, "max_writers", 2)
    with writer.attach(door_of(heap)), writer.attach(door_of(heap)) as second:
        with pytest.raises(TransferFailed):
            writer.attach(door_of(heap))
        second.close()
        third: list[PeerHeap] = []

        def is_in() -> bool:
            try:
                third.append(writer.attach(door_of(heap)))
            except TransferFailed:
                return False
            return True

        wait_until(is_in, "room for a writer")
        third[0].close()


# --- what a writer may do ------------------------------------------------------------------------------


@pytest.fixture
def known(heap: HostHeap) -> Iterator[socket.socket]:
    """A writer that is let in, and then says what it likes."""
    with connect(heap) as connection:
        connection.sendall(hello(heap, connection))
        welcome = connection.recv(greeting.WELCOME_NBYTES, socket.MSG_WAITALL)
        connection.recv(int.from_bytes(welcome[-4:], "little"), socket.MSG_WAITALL)
        yield connection


@pytest.mark.parametrize(
    "hostile",
    [
        frames.head(frames.PUT, 1, 8) + frames.SPAN.pack(1 << 63, 8) + bytes(8),
        frames.head(frames.PUT, 1 << 31, 1 << 63),
        frames.head(frames.SIGNAL, 1 << 31, 1),
        frames.head(frames.HOLD, 1 << 31),
        frames.head(200),
    ],
)
def test_a_writer_at_fault_is_torn_down_and_its_lanes_are_free(
    heap: HostHeap, known: socket.socket, hostile: bytes
) -> None:
    set_data(heap, POISON_BYTE)
    known.sendall(frames.head(frames.HOLD, 5))
    assert known.recv(16, socket.MSG_WAITALL)[0] == frames.HELD
    assert heap.is_held(1, 1)

    known.sendall(hostile)

    assert is_closed(known)
    wait_until(lambda: not heap.is_held(1, 1), "the end of its lane")
    assert (data_of(heap) == POISON_BYTE).all()


def test_a_writer_that_reads_no_answers_is_torn_down(heap: HostHeap, known: socket.socket) -> None:
    known.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    known.sendall(frames.head(frames.HOLD, 0))
    assert known.recv(16, socket.MSG_WAITALL)[0] == frames.HELD
    try:
        while True:
            known.sendall(frames.head(frames.BEAT) * 4096)
    except (BrokenPipeError, ConnectionResetError):
        pass
    wait_until(lambda: not heap.is_held(0, 0), "the end of its lane")


def test_a_lane_is_held_by_one_way_at_a_time(heap: HostHeap, writer: HostHeap) -> None:
    """Through the door, and by shared memory: the same lock."""
    with writer.attach(heap.address) as mapped, writer.attach(door_of(heap)) as remote:
        assert (mapped.address.kind, remote.address.kind) == ("shm", "tcp")
        assert mapped.hold(1, 2)
        assert not remote.hold(1, 2)
        mapped.let_go(1, 2)
        assert remote.hold(1, 2)
        assert not mapped.hold(1, 2)
        assert heap.is_held(1, 2)
        assert heap.is_held(1, 2), "asking twice lets nothing go"
        assert not mapped.hold(1, 2)
        remote.let_go(1, 2)
        settle(remote, heap)
        assert mapped.hold(1, 2)
        mapped.let_go(1, 2)


def test_a_closed_grant_is_told_to_whoever_sends(heap: HostHeap, writer: HostHeap) -> None:
    with writer.attach(door_of(heap)) as peer:
        state = heap.words.state(1)
        heap.store(state, 7)
        assert peer.hold(1, 0)
        assert peer.read(state) == 7
        heap.store(state, 8)

        def is_told() -> bool:
            peer.signal(heap.words.begin(1, 0), 1)
            return peer.read(state) == 8

        wait_until(is_told, "news of the grant")
        peer.let_go(1, 0)


# --- nothing comes late --------------------------------------------------------------------------------


def test_a_frozen_writer_is_torn_down_and_writes_nothing_when_it_wakes(heap: HostHeap) -> None:
    """It is stopped in the middle of its puts. Its lane is free after a silence, and then no byte changes."""
    progress = heap.words.begin(0, 0)
    with Child("tcp", THEIRS) as child:
        child.ask("attach", address=door_of(heap))
        assert child.ask("hold", slot=1, lane=1)
        child.send("put_for_ever", word=progress)
        wait_until(lambda: heap.load(progress) > 20, "puts")
        child.stop()
        assert heap.is_held(1, 1)

        lose_patience(heap)
        wait_until(lambda: not heap.is_held(1, 1), "the end of a silent writer")
        words = [heap.load(word) for word in range(heap.words.num_words)]
        set_data(heap, POISON_BYTE)
        child.signal(signal.SIGCONT)

        # It finds out, and ends with an error: nothing that it sent is on its way any more.
        assert child.ended() != 0
        assert (data_of(heap) == POISON_BYTE).all()
        assert [heap.load(word) for word in range(heap.words.num_words)] == words


def test_an_owner_that_is_frozen_is_given_up(heap: HostHeap) -> None:
    """``hold`` ends, and so does everything that waits: nobody blocks for ever."""
    with Child("tcp", THEIRS) as child:
        peer = heap.attach(child.address)
        assert isinstance(peer, TcpPeerHeap)
        assert peer.hold(0, 0)
        child.stop()
        peer._line.silence_s = peer._post._tick_s = 0.2
        with pytest.raises(TransferFailed, match=r"lost|does not answer"):
            peer.hold(0, 1)
        peer.poll(wait=True)
        assert peer.is_lost and peer.is_idle
        with pytest.raises(TransferFailed, match="lost"):
            peer.put(Copies([Copy(0, 0, 8)]))
        peer.signal(0, 1)
        peer.let_go(0, 0)
        assert not peer.owner_is_dead(), "no proof: it may wake"
        peer.close()


def test_a_lane_that_is_granted_too_late_is_let_go(heap: HostHeap, monkeypatch: pytest.MonkeyPatch) -> None:
    """A door that does not answer in time may do so later; until then nobody waits for it again."""
    monkeypatch.setattr(peer_module, "HOLD_S", 0.05)
    with Child("tcp", THEIRS) as child, heap.attach(child.address) as peer:
        child.stop()
        with pytest.raises(TransferFailed, match="does not answer"):
            peer.hold(0, 1)
        for lane in (1, 2):
            with pytest.raises(TransferFailed, match="still does not answer"):
                peer.hold(0, lane)
        child.signal(signal.SIGCONT)
        monkeypatch.setattr(peer_module, "HOLD_S", 30.0)

        def is_ours() -> bool:
            with contextlib.suppress(TransferFailed):
                return peer.hold(0, 1)
            return False

        wait_until(is_ours, "the lane, once it was let go")
        peer.let_go(0, 1)


def test_what_was_sent_before_a_death_is_there(heap: HostHeap) -> None:
    """In order, and then the lane is free."""
    with Child("tcp", THEIRS) as child:
        child.ask("attach", address=door_of(heap))
        assert child.ask("hold", slot=0, lane=3)
        child.send("put_for_ever", word=heap.words.begin(0, 0))
        wait_until(lambda: heap.load(heap.words.begin(0, 0)) > 5, "puts")
        child.kill()
    wait_until(lambda: not heap.is_held(0, 3), "the end of its lane")
    # Each round painted everything before it was counted; one more may be here in part.
    assert heap.load(heap.words.begin(0, 0)) > 5
    assert not heap.is_held(0, 3)
