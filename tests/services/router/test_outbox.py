from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.bus.codec import MAX_MESSAGE_NBYTES
from microserve.protocol.messages.engine import TokenLogprob, Usage
from microserve.protocol.messages.router import Ended, Output, Phases, Stream
from microserve.services.router.outbox import MAX_STREAM_TOKENS, Outbox

ENDED = Ended("length", Usage(), Phases(), "s", [])


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), max_size=40),
    st.lists(st.integers(0, 3), max_size=40),
)
def test_nothing_is_lost_or_reordered_whatever_the_credit(
    pushes: list[tuple[str, int]], credits: list[int]
) -> None:
    outbox = Outbox()
    sent: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    got: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    ended: set[str] = set()
    messages = 0

    def take() -> None:
        nonlocal messages
        while (stream := outbox.take()) is not None:
            messages += 1
            for output in stream.outputs:
                assert output.request_id not in ended
                assert output.offset == len(got[output.request_id])
                got[output.request_id] += output.token_ids
                if output.ended is not None:
                    ended.add(output.request_id)

    granted = 0
    for (request_id, count), credit in zip(pushes, [*credits, *[0] * len(pushes)], strict=False):
        begin = len(sent[request_id])
        tokens = list(range(begin, begin + count))
        sent[request_id] += tokens
        outbox.add(Output(request_id, begin, tokens))
        outbox.window.grant(credit)
        granted += credit
        take()
        assert messages <= granted
    for request_id in "abc":
        outbox.add(Output(request_id, len(sent[request_id]), [], [], ENDED))
    outbox.window.grant(100)
    take()
    assert got == sent
    assert ended == {"a", "b", "c"}
    assert len(outbox) == 0


def test_without_credit_everything_of_a_request_becomes_one_output() -> None:
    outbox = Outbox()
    for position in range(50):
        outbox.add(Output("r", position, [position], [TokenLogprob(-1.0)]))
    outbox.add(Output("r", 50, [], [], ENDED))
    assert outbox.take() is None
    outbox.window.grant(1)
    stream = outbox.take()
    assert stream is not None
    assert stream.outputs == [Output("r", 0, list(range(50)), [TokenLogprob(-1.0)] * 50, ENDED)]


def test_one_message_never_outgrows_what_a_gateway_may_read() -> None:
    top = [(2**31, -123.456)] * 20
    count = 2 * MAX_STREAM_TOKENS + 10
    outbox = Outbox()
    outbox.window.grant(10)
    outbox.add(Output("r", 0, [2**31] * count, [TokenLogprob(-1.0, top)] * count, ENDED))
    outbox.add(Output("q", 0, [1], [], ENDED))
    streams: list[Stream] = []
    while (stream := outbox.take()) is not None:
        streams.append(stream)
    assert [len(s.outputs) for s in streams] == [1, 1, 2]
    assert max(len(msgspec.msgpack.encode(s)) for s in streams) < MAX_MESSAGE_NBYTES
    assert sum(len(o.token_ids) for s in streams for o in s.outputs) == count + 1
    assert [o.ended is not None for s in streams for o in s.outputs] == [False, False, True, True]
