"""Numbers reveal every loss with the next message, on sockets that lose what the test says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol.bus import numbered as module
from microserve.protocol.bus.numbered import Incoming, NumberedClient, NumberedServer, Outgoing, Verdict
from microserve.protocol.bus.transport import ZmqBus
from tests.support.bus.lossy_bus import LossyBus
from tests.support.bus.numbered_pair import HEADER, Pair
from tests.support.bus.socket_world import ANY, on_bus, until

LAST = 0xFFFF_FFFF


def number_of(frame: bytes) -> tuple[int, int]:
    assert len(frame) == 10
    return int.from_bytes(frame[2:6], "little"), int.from_bytes(frame[6:], "little")


# --- one direction, without sockets ----------------------------------------------------------------


@settings(deadline=None)
@given(
    first=st.sampled_from([1, 2, 1000, LAST - 3, LAST, 0]),
    copies=st.lists(st.sampled_from([0, 1, 1, 1, 2]), max_size=30),
)
def test_every_gap_is_told_with_the_next_message_and_no_message_is_delivered_twice(
    first: int, copies: list[int]
) -> None:
    """``copies``: how often each message gets through."""
    outgoing, incoming = Outgoing(7, first), Incoming()
    # The peer is known from the message before the first, but for a first message of all.
    expects_loss = False
    if first != 1:
        incoming.take(7, first - 1 & LAST)
    for count in copies:
        epoch, number = number_of(outgoing.stamp(HEADER))
        for copy in range(count):
            verdict = incoming.take(epoch, number)
            if copy:
                assert verdict is Verdict.DUPLICATE
            else:
                assert verdict is (Verdict.GAP if expects_loss else Verdict.NEXT)
                expects_loss = False
        expects_loss = expects_loss or not count


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), max_size=40))
def test_whatever_the_order_each_message_is_taken_once_and_all_but_the_next_are_a_loss(
    order: list[int],
) -> None:
    outgoing, incoming = Outgoing(7), Incoming()
    sent = [number_of(outgoing.stamp(HEADER)) for _ in range(61)]
    taken: list[int] = []
    for i in order:
        verdict = incoming.take(*sent[i])
        if verdict is Verdict.DUPLICATE:
            assert taken and i <= taken[-1]
            continue
        is_next = i == (taken[-1] + 1 if taken else 0)
        assert verdict is (Verdict.NEXT if is_next else Verdict.GAP)
        taken.append(i)
    assert taken == sorted(set(taken))


@pytest.mark.parametrize("number", [0, 2, LAST])
def test_unknown_peer_whose_first_number_is_not_one_has_lost_something(number: int) -> None:
    assert Incoming().take(7, number) is Verdict.GAP


@pytest.mark.parametrize(("number", "verdict"), [(1, Verdict.REBORN), (2, Verdict.GAP), (5, Verdict.GAP)])
def test_another_life_of_the_peer(number: int, verdict: Verdict) -> None:
    incoming = Incoming()
    for i in (1, 2, 3, 4):
        assert incoming.take(7, i) is Verdict.NEXT
    assert incoming.take(8, number) is verdict
    assert incoming.take(8, number + 1) is Verdict.NEXT


def test_numbers_wrap() -> None:
    outgoing, incoming = Outgoing(7, LAST), Incoming()
    incoming.take(7, LAST - 1)
    stamped = [number_of(outgoing.stamp(HEADER)) for _ in range(4)]
    assert [number for _, number in stamped] == [LAST, 0, 1, 2]
    assert [incoming.take(*stamp) for stamp in stamped] == [Verdict.NEXT] * 4
    assert incoming.take(7, LAST) is Verdict.DUPLICATE


# --- both ends -------------------------------------------------------------------------------------


def test_the_handler_sees_the_frames_that_were_sent() -> None:
    pair = Pair()
    got: list[list[bytes]] = []
    server = NumberedServer(pair.bus, ANY, lambda peer, frames: got.append(frames), lambda peer: None)
    pair.up(b"m")
    assert got == [[HEADER, b"m"]]
    server.close()


def test_a_loss_is_told_before_the_message_that_revealed_it() -> None:
    pair = Pair()
    for text, lost in ((b"a", False), (b"b", True), (b"c", False), (b"d", False)):
        pair.up(text, lost=lost)
        pair.down(text, lost=lost)
    assert pair.at_server == [b"a", "loss", b"c", b"d"]
    assert pair.at_client == [b"a", "messages were lost", b"c", b"d"]
    assert pair.server.num_lost == 1


def test_a_duplicate_is_dropped_and_counted() -> None:
    pair = Pair()
    pair.up(b"a")
    pair.client.send([HEADER, b"b"])
    frames = pair.bus.to_server.pop()
    assert pair.bus.server_handler is not None
    assert pair.bus.client_handler is not None
    for _ in range(3):
        pair.bus.server_handler(b"p", frames)
    pair.server.send(b"p", [HEADER, b"c"])
    _, frames = pair.bus.to_client.pop()
    for _ in range(3):
        pair.bus.client_handler(frames)
    assert (pair.at_server, pair.at_client) == ([b"a", b"b"], [b"c"])
    assert (pair.server.num_duplicates, pair.client.num_duplicates) == (2, 2)


def test_a_refused_message_leaves_a_gap() -> None:
    pair = Pair()
    pair.up(b"a")
    pair.down(b"a")
    pair.bus.refuse = True
    assert not pair.client.send([HEADER, b"b"])
    assert not pair.server.send(b"p", [HEADER, b"b"])
    pair.bus.refuse = False
    pair.up(b"c")
    pair.down(b"c")
    assert pair.at_server == [b"a", "loss", b"c"]
    assert pair.at_client == [b"a", "messages were lost", b"c"]


def test_a_new_server_behind_the_same_address_is_a_loss_to_both() -> None:
    pair = Pair()
    pair.up(b"a")
    pair.down(b"a")
    pair.server = NumberedServer(
        pair.bus,
        ANY,
        lambda peer, frames: pair.at_server.append(frames[1]),
        lambda peer: pair.at_server.append("loss"),
    )
    pair.up(b"b")
    pair.down(b"b")
    assert pair.at_server == [b"a", "loss", b"b"]
    assert pair.at_client == [b"a", "the peer is another life of it", b"b"]


def test_a_reborn_client_is_a_fresh_peer_to_the_server() -> None:
    pair = Pair()
    pair.up(b"a")
    pair.down(b"a")
    pair.client = pair.new_client()
    pair.up(b"b")
    pair.down(b"b")
    assert (pair.at_server, pair.at_client) == ([b"a", b"b"], [b"a", b"b"])


def test_a_closed_client_gets_nothing_more() -> None:
    pair = Pair()
    pair.up(b"a")
    pair.client = NumberedClient(
        pair.bus, ANY, lambda frames: pair.at_client.append(frames[1]), lambda detail: pair.client.close()
    )
    pair.down(b"lost", lost=True)
    pair.down(b"b")
    assert pair.at_client == []


@pytest.mark.parametrize(
    "header", [b"", b"\x01", HEADER, HEADER + b"1234567", HEADER + b"123456789", b"\x02\x0212345678"]
)
def test_a_peer_that_does_not_number_is_served_as_it_is(header: bytes) -> None:
    pair = Pair()
    got: list[list[bytes]] = []
    NumberedServer(pair.bus, ANY, lambda peer, frames: got.append(frames), lambda peer: None)
    assert pair.bus.server_handler is not None
    assert pair.bus.client_handler is not None
    for frames in ([header, b"a"], [header, b"a"], [header]):
        pair.bus.server_handler(b"old", list(frames))
        assert got[-1] == frames
    pair.server.send(b"old", [HEADER, b"answer"])
    assert pair.bus.to_client.pop() == (b"old", [HEADER, b"answer"])
    pair.bus.client_handler([header, b"from an old server"])
    assert pair.at_client == [b"from an old server"]


def test_a_peer_that_stops_numbering_is_answered_without_numbers() -> None:
    pair = Pair()
    pair.up(b"a")
    assert pair.bus.server_handler is not None
    pair.bus.server_handler(b"p", [HEADER, b"b"])
    pair.server.send(b"p", [HEADER, b"answer"])
    assert pair.bus.to_client.pop() == (b"p", [HEADER, b"answer"])
    assert pair.at_server == [b"a", b"b"]


def test_messages_without_frames_are_handed_over() -> None:
    pair = Pair()
    got: list[object] = []
    NumberedServer(pair.bus, ANY, lambda peer, frames: got.append(frames), lambda peer: None)
    NumberedClient(pair.bus, ANY, got.append, got.append)
    assert pair.bus.server_handler is not None
    assert pair.bus.client_handler is not None
    pair.bus.server_handler(b"p", [])
    pair.bus.client_handler([])
    assert got == [[], []]


def test_state_is_bounded_and_a_forgotten_peer_that_returns_has_lost_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_NUMBERED_PEERS", 3)
    pair = Pair()
    pair.up(b"a")
    pair.down(b"a")
    for i in range(10):
        pair.stranger(b"%d" % i)
    assert len(pair.server._peers) == 3
    pair.up(b"b")
    pair.down(b"b")
    assert pair.at_server == [b"a", *[b"hi"] * 10, "loss", b"b"]
    assert pair.at_client == [b"a", "the peer is another life of it", b"b"]


def test_the_quietest_peer_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NUMBERED_PEERS", 2)
    pair = Pair()
    pair.up(b"a")
    for i in range(10):
        pair.stranger(b"%d" % i)
        pair.up(b"b")
    assert "loss" not in pair.at_server


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["up", "down"]), st.sampled_from(["ok", "ok", "ok", "lost", "refused"])),
        max_size=40,
    )
)
def test_whatever_gets_lost_is_told_once_with_the_next_message(events: list[tuple[str, str]]) -> None:
    pair = Pair()
    pair.up(b"hello")
    pair.down(b"welcome")
    told = {"up": pair.at_server, "down": pair.at_client}
    expected: dict[str, list[object]] = {"up": [b"hello"], "down": [b"welcome"]}
    missing = {"up": False, "down": False}
    words = {"up": "loss", "down": "messages were lost"}
    for i, (way, fate) in enumerate(events):
        text = b"%d" % i
        pair.bus.refuse = fate == "refused"
        (pair.up if way == "up" else pair.down)(text, lost=fate != "ok")
        if fate == "ok":
            expected[way] += [words[way], text] if missing[way] else [text]
        missing[way] = fate != "ok"
        assert told == expected


# --- real sockets ----------------------------------------------------------------------------------


def test_over_real_sockets_a_swallowed_message_is_told_on_either_side() -> None:
    async def test(bus: ZmqBus) -> None:
        lossy = LossyBus(bus)
        at_server: list[object] = []
        at_client: list[object] = []

        def answer(peer: bytes, frames: list[bytes]) -> None:
            at_server.append(frames[1])
            server.send(peer, [HEADER, frames[1]])

        server = NumberedServer(lossy, ANY, answer, lambda peer: at_server.append("loss"))
        client = NumberedClient(
            lossy, server.address, lambda frames: at_client.append(frames[1]), at_client.append
        )
        lossy.swallow_up, lossy.swallow_down = {2}, {3}
        for i in range(1, 6):
            client.send([HEADER, b"%d" % i])
        await until(lambda: at_client[-1:] == [b"5"])

        assert at_server == [b"1", "loss", b"3", b"4", b"5"]
        assert at_client == [b"1", b"3", "messages were lost", b"5"]

    on_bus(test)
