"""Tokens that wait for credit: merged, in order, in messages that fit the wire."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.bus.codec import ENGINE_REPLY, MAX_MESSAGE_NBYTES
from microserve.protocol.bus.credit import CreditWindow
from microserve.protocol.messages.engine import Delta, Finished, Timings, TokenLogprob, Usage
from microserve.services.engine.session import MAX_MESSAGE_TOKENS, Session, Sessions

END = Finished("length", Usage(), Timings())


def session(credit: int = 1000) -> Session:
    return Session(b"p", "r", 1, CreditWindow(credit), 0.0)


@given(st.integers(0, 1 << 30))
def test_any_mix_of_credit_and_deltas_keeps_every_token_in_order(seed: int) -> None:
    rng = random.Random(seed)
    box = session(credit=0)
    sent: dict[str, list[int]] = {}
    received: dict[str, list[int]] = {}
    ended: list[str] = []
    names = ["a", "b", "c"]

    def take() -> None:
        while (message := box.take()) is not None:
            for delta in message.deltas:
                have = received.setdefault(delta.request_id, [])
                assert delta.offset == len(have)
                have.extend(delta.token_ids)
                if delta.finished is not None:
                    ended.append(delta.request_id)

    for _ in range(rng.randrange(60)):
        name = rng.choice(names)
        have = sent.setdefault(name, [])
        tokens = [rng.randrange(1000) for _ in range(rng.choice([1, 1, 2, 9000]))]
        box.add(Delta(name, len(have), list(tokens), []))
        have.extend(tokens)
        if rng.random() < 0.3:
            box.window.grant(rng.randrange(3))
            take()
    for name, have in sent.items():
        box.add(Delta(name, len(have), [], [], END))
    box.window.grant(1000)
    take()

    assert received == sent
    assert sorted(ended) == sorted(sent)


def test_a_message_fits_the_wire_however_long_the_wait() -> None:
    box = session(credit=0)
    logprob = TokenLogprob(-1.25, [(49_000 + i, -1.5) for i in range(20)])
    count = 2 * MAX_MESSAGE_TOKENS + 5
    box.add(Delta("r", 0, [49_000] * count, [logprob] * count, END))
    box.window.grant(10)
    sizes = []
    while (message := box.take()) is not None:
        assert len(ENGINE_REPLY.encode(message)[1]) < MAX_MESSAGE_NBYTES
        sizes.append(sum(len(delta.token_ids) for delta in message.deltas))
    assert sum(sizes) == count


def test_a_new_life_replaces_the_old_one() -> None:
    sessions = Sessions(silence_s=3.0)
    first, replaced = sessions.open(b"p1", "r", 1, 4, 0.0)
    assert replaced == []
    again, replaced = sessions.open(b"p1", "r", 1, 9, 1.0)
    assert (again, replaced) == (first, [])
    assert first.window.credit == 9
    second, replaced = sessions.open(b"p2", "r", 2, 4, 2.0)
    assert replaced == [first]
    assert sessions.find(b"p1") is None
    assert [sessions.expire(now) for now in (2.0, 3.0, 4.0, 4.9)] == [[], [], [], []]
    assert sessions.expire(5.1) == [second]


def test_a_new_connection_of_the_same_life_replaces_the_old_one() -> None:
    sessions = Sessions(silence_s=3.0)
    first, _ = sessions.open(b"p1", "r", 1, 4, 0.0)
    other, _ = sessions.open(b"p2", "s", 1, 4, 0.0)
    second, replaced = sessions.open(b"p3", "r", 1, 4, 0.0)
    assert replaced == [first]
    assert sessions.all() == [other, second]
    again, replaced = sessions.open(b"p3", "r", 1, 4, 1.0)
    assert (again, replaced) == (second, [])
    assert sessions.remove(b"p3") is second
    assert sessions.remove(b"p3") is None
