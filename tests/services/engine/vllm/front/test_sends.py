"""Sends from an engine that is vLLM's: what one is asked for as, and when it has been sent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from microserve.protocol.errors import InvalidInterval
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.vllm.link import Send
from tests.support.engine.vllm_front import GREEDY, ROUTER, FrontRig

pytestmark = pytest.mark.slow

PROMPT = list(range(3, 17))  # 14 tokens: three blocks and a half


@pytest.fixture
def rig() -> Iterator[FrontRig]:
    rig = FrontRig()
    yield rig
    rig.close()


def remote_send(rig: FrontRig, begin: int, end: int, *, sampling: SamplingParams | None = None) -> None:
    other = FrontRig()
    try:
        grant = other.granted("r", PROMPT, 14)
    finally:
        other.close()
    message = wire.RemoteSend(rig.call(), "r", begin, end, grant, 0, 60.0, sampling)
    rig.take(rig.actions.remote_send(ROUTER, message, PROMPT, rig.now))


@pytest.mark.parametrize("put_first", [False, True])
def test_a_send_is_answered_when_its_token_and_all_of_its_kv_are_there(
    rig: FrontRig, put_first: bool
) -> None:
    remote_send(rig, 4, 14, sampling=GREEDY)
    (running,) = rig.launched
    assert isinstance(running.ask, Send) and running.ask.leave_first
    assert running.sampling["max_tokens"] == 1 and running.transfer is not None
    rig.accept(running)
    assert not rig.take()

    def put() -> None:
        assert running.transfer is not None
        running.transfer.nbytes, running.transfer.put_s = 1280, 0.5
        rig.state.end_send(running, rig.now)

    for step in (put, lambda: rig.say(running, 42, finish="length"))[:: 1 if put_first else -1]:
        assert not rig.take()
        step()
    (reply,) = rig.take()
    assert isinstance(reply, wire.Sent)
    assert (reply.first_token, reply.nbytes, reply.sent) == (42, 1280, 10)
    rig.check_idle()


@pytest.mark.parametrize(("begin", "end", "field"), [(2, 14, "begin"), (0, 6, "end")])
def test_a_send_is_of_whole_blocks(rig: FrontRig, begin: int, end: int, field: str) -> None:
    with pytest.raises(InvalidInterval) as caught:
        remote_send(rig, begin, end)
    assert caught.value.field == field
    rig.check_idle()


def test_a_send_that_fails_is_taken_from_vllm(rig: FrontRig) -> None:
    remote_send(rig, 0, 14)
    (running,) = rig.launched
    rig.abort("r")
    replies = rig.replies
    assert [type(each) for each in replies] == [wire.Done, wire.Failed]
    assert rig.cancelled == [running]
    rig.check_idle()
