"""A line of a writer: what goes out in which order, what the answers do, and when it is given up."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kvcache.heap.doors.tcp import frames
from microserve.kvcache.heap.doors.tcp.line import End, Line
from microserve.protocol.errors import ProtocolViolation, TransferFailed

SILENCE_S = 8.0


class Flown:
    """A put by another way that ends when it is told to."""

    nbytes, seconds = 1 << 20, 0.5

    def __init__(self) -> None:
        self.is_done, self.is_dropped, self.fault = False, False, False

    def is_over(self) -> bool:
        if self.fault:
            raise TransferFailed("it failed")
        return self.is_done

    def drop(self) -> None:
        self.is_dropped = True


def take(line: Line, nbytes: int = 1 << 30, now: float = 0.0) -> bytes:
    """What the network takes of it now."""
    some = b"".join(line.parts())[:nbytes]
    line.sent(len(some), now)
    return some


def drain(line: Line) -> bytes:
    out = b""
    while some := take(line):
        out += some
    return out


@settings(deadline=None)
@given(st.integers(0, 1 << 30))
def test_puts_and_signals_go_out_in_order_and_questions_between_frames(seed: int) -> None:
    chance = random.Random(seed)
    line, source = Line(SILENCE_S, 0.0), memoryview(random.Random(1).randbytes(9_000))
    expected, out, asked = b"", b"", 0
    for number in range(20):
        if chance.random() < 0.5:
            spans = [(chance.randrange(4_000), number, chance.randrange(1, 5_000)) for _ in range(3)]
            for frame in frames.put_frames(spans, source):
                line.put(frame)
                expected += b"".join(frame)
        elif chance.random() < 0.5:
            line.put([signal := frames.head(frames.SIGNAL, number, 7)])
            expected += signal
        else:
            line.give_up(line.ask(frames.HOLD, number, frames.HELD))
            asked += 1
        while chance.random() < 0.7:
            out += take(line, chance.randrange(1, 3_000))
    out += drain(line)
    assert not line.has_parts
    # The questions stand between whole frames; without them it is what was put, in order.
    left, found = b"", 0
    while out:
        kind, small, large = frames.HEAD.unpack_from(out)
        nbytes = frames.HEAD.size + (small * frames.SPAN.size + large if kind == frames.PUT else 0)
        found += kind == frames.HOLD
        left += b"" if kind == frames.HOLD else out[:nbytes]
        out = out[nbytes:]
    assert (left, found) == (expected, asked)


def test_frames_add_less_than_a_thousandth_to_kv_of_whole_blocks() -> None:
    """A prompt of 75 scattered blocks of 32 KiB: each layer's KV, its tags and its count. What else a wire
    carries is headers of Ethernet, IP and TCP, of these bytes and of what acknowledges them."""
    line, block_nbytes, blocks = Line(SILENCE_S, 0.0), 1 << 15, np.arange(0, 150, 2)
    source = memoryview(bytes(block_nbytes))
    for _ in range(4):
        for frame in frames.put_frames([(0, int(b) * block_nbytes, block_nbytes) for b in blocks], source):
            line.put(frame)
        for signal in frames.signal_each_frames(blocks, 1):
            line.put([signal])
        line.put([frames.head(frames.SIGNAL, 7, 1)])
    kv_nbytes = 4 * len(blocks) * block_nbytes
    assert kv_nbytes < len(drain(line)) < kv_nbytes * 1.001


def test_a_question_does_not_wait_for_puts() -> None:
    line = Line(SILENCE_S, 0.0)
    source = memoryview(bytes(4 * frames.MAX_PUT_NBYTES))
    for frame in frames.put_frames([(0, 0, len(source))], source):
        line.put(frame)
    assert take(line, 100)[0] == frames.PUT
    line.ask(frames.HOLD, 3, frames.HELD)
    rest = take(line)
    assert len(rest) <= frames.MAX_PUT_NBYTES + 100, "the frame that has begun, and no other"
    assert take(line, frames.HEAD.size) == frames.head(frames.HOLD, 3)


def test_a_lane_is_ours_from_its_answer_until_it_is_said_to_be_free() -> None:
    line = Line(SILENCE_S, 0.0)
    question = line.ask(frames.HOLD, 5, frames.HELD)
    line.received(frames.head(frames.HELD, 5, 77)[:7], 1.0)
    assert question.answer is None
    line.received(frames.head(frames.HELD, 5, 77)[7:], 1.0)
    assert question.answer == (frames.HELD, 5, 77)
    assert (line.lanes, line.told) == ({5: True}, {1: 77})
    line.received(frames.head(frames.STATE, 1, 78), 1.0)
    assert line.told == {1: 78}
    line.let_go(5)
    assert line.lanes == {5: False}
    line.received(frames.head(frames.FREE, 5), 1.0)
    assert (line.lanes, line.told) == ({}, {})


def test_each_question_has_its_own_answer_whoever_asks_meanwhile() -> None:
    line = Line(SILENCE_S, 0.0)
    taken, refused = (line.ask(frames.HOLD, index, frames.HELD) for index in (3, 4))
    value = line.ask(frames.READ, 3, frames.VALUE)
    line.received(frames.head(frames.VALUE, 3, 9) + frames.head(frames.BUSY, 4), 1.0)
    assert (taken.answer, refused.answer, value.answer) == (None, (frames.BUSY, 4, 0), (frames.VALUE, 3, 9))
    line.give_up(refused)
    assert line.given_up == set(), "it has been answered"
    line.received(frames.head(frames.HELD, 3, 1), 1.0)
    assert taken.answer == (frames.HELD, 3, 1)
    assert line.lanes == {3: True}


def test_an_answer_that_comes_too_late_is_let_go() -> None:
    line = Line(SILENCE_S, 0.0)
    line.give_up(line.ask(frames.HOLD, 2, frames.HELD))
    assert line.given_up == {2}
    drain(line)
    line.received(frames.head(frames.HELD, 2, 1), 1.0)
    assert (line.given_up, line.lanes) == (set(), {2: False})
    assert drain(line) == frames.head(frames.LET_GO, 2)
    line.give_up(line.ask(frames.HOLD, 2, frames.HELD))
    line.received(frames.head(frames.BUSY, 2), 1.0)
    assert line.given_up == set()


@pytest.mark.parametrize("frame", [frames.head(frames.HELD, 1), frames.head(frames.BUSY, 1), frames.head(99)])
def test_an_answer_to_nothing_is_a_fault(frame: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        Line(SILENCE_S, 0.0).received(frame, 0.0)


def test_a_line_says_that_it_lives_and_is_given_up_when_nothing_is_heard() -> None:
    line = Line(SILENCE_S, 0.0)
    beats = 0
    for quarter in range(1, 40):
        now = quarter * SILENCE_S / 4
        line.tick(now)
        beats += drain(line) == frames.head(frames.BEAT)
        line.received(frames.head(frames.BEAT), now)
    assert beats == 39
    assert line.end is None
    line.tick(now + SILENCE_S + 0.1)
    assert line.end is End.SILENT
    assert not line.has_parts


@pytest.mark.parametrize(("why", "end"), [(1, End.LEFT), (2, End.TORN), (3, End.FAULT), (9, End.CLOSED)])
def test_a_lost_line_holds_nothing_and_sends_nothing(why: int, end: End) -> None:
    line, flight = Line(SILENCE_S, 0.0), Flown()
    line.ask(frames.HOLD, 2, frames.HELD)
    line.received(frames.head(frames.HELD, 2, 1), 1.0)
    line.fly(flight)
    line.put([frames.head(frames.SIGNAL, 1, 1)])
    line.received(frames.head(frames.TORN, why), 1.0)
    assert line.end is end
    assert (line.lanes, line.told, line.parts()) == ({}, {}, [])
    assert flight.is_dropped


def test_what_follows_a_flight_waits_for_it() -> None:
    line, first, second = Line(SILENCE_S, 0.0), Flown(), Flown()
    signals = [frames.head(frames.SIGNAL, number, 1) for number in range(3)]
    line.put([signals[0]])
    line.fly(first)
    line.put([signals[1]])
    line.fly(second)
    line.put([signals[2]])
    assert drain(line) == signals[0]
    assert line.awaits_flight and not line.has_parts
    second.is_done = True
    assert drain(line) == b""
    line.ask(frames.HOLD, 1, frames.HELD)
    assert drain(line) == frames.head(frames.HOLD, 1), "a question does not"
    first.is_done = True
    assert drain(line) == signals[1] + signals[2]
    assert not line.awaits_flight
    assert line.nbytes_per_s == (1 << 20) / 0.5
    line.fly(failing := Flown())
    failing.fault = True
    with pytest.raises(TransferFailed):
        line.parts()


def test_a_network_is_measured_while_it_is_full() -> None:
    """What the socket took before tells nothing of the network."""
    line, source = Line(SILENCE_S, 0.0), memoryview(bytes(1 << 20))
    assert line.unsent_nbytes == 1 << 22
    for frame in frames.put_frames([(0, 0, len(source))], source):
        line.put(frame)
    assert line.nbytes_per_s == 0
    total = len(take(line, 300_000, 1.0))
    line.full(1.0)
    after = 0
    now = 1.0
    while line.has_parts:
        now += 0.1
        after += len(take(line, 100_000, now))
        line.full(now)
    assert total + after > 1 << 20
    assert line.nbytes_per_s == pytest.approx(after / (now - 1.0))
    [(nbytes, seconds)] = line.samples
    assert nbytes == after and seconds == pytest.approx(now - 1.0)
    assert line.unsent_nbytes == 1 << 18, "a slow network, and little that waits in the kernel"


def test_what_waits_can_be_copied() -> None:
    line, source = Line(SILENCE_S, 0.0), bytearray(b"x" * 3_000)
    for frame in frames.put_frames([(0, 0, 3_000)], memoryview(source)):
        line.put(frame)
    out = take(line, 500)
    line.copy_waiting()
    source[:] = b"y" * 3_000
    out += drain(line)
    assert out.count(b"x") == 3_000 and b"y" not in out
