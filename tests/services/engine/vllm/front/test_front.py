"""The front of vLLM: grants over its blocks, streams, sends; in every order in which things can happen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from microserve.protocol.errors import Draining, InvalidInterval, InvalidRequest, PromptTooLong
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams
from microserve.services.engine.vllm.front.receives import ALLOCATE_S
from microserve.services.engine.vllm.link import DROP, TAKE, WAIT, Generate
from tests.support.engine.vllm_front import FrontRig

pytestmark = pytest.mark.slow

PROMPT = list(range(3, 17))  # 14 tokens: three blocks and a half


@pytest.fixture
def rig() -> Iterator[FrontRig]:
    rig = FrontRig()
    yield rig
    rig.close()


# --- streams -----------------------------------------------------------------------------------------


def test_a_stream(rig: FrontRig) -> None:
    assert rig.generate("r", PROMPT) is None, "vLLM has not taken it yet"
    (running,) = rig.launched
    assert running.ask is None and running.sampling["max_tokens"] == 4
    rig.accept(running)
    assert [type(each) for each in rig.take()] == [wire.Accepted]
    rig.say(running, 5)
    rig.say(running, 6, 2, finish="stop", stop=2)
    rig.take()
    assert [delta.offset for delta in rig.deltas] == [0, 1]
    finished = rig.deltas[-1].finished
    assert finished is not None and (finished.reason, finished.stop_token_id) == ("stop", 2)
    assert finished.usage.output_tokens == 3 and not finished.numerics.is_exact
    rig.check_idle()


def test_a_call_that_is_repeated_is_answered_as_well(rig: FrontRig) -> None:
    assert rig.generate("r", PROMPT) is None and rig.generate("r", PROMPT) is None
    (running,) = rig.launched
    rig.accept(running)
    assert len(rig.take()) == 2
    assert isinstance(rig.generate("r", PROMPT), wire.Accepted)
    assert len(rig.launched) == 1, "it runs once"


def test_what_vllm_refuses_is_the_callers_error(rig: FrontRig) -> None:
    rig.generate("r", PROMPT)
    rig.state.fail(rig.launched[0], InvalidRequest("too hot", field="temperature"), rig.now)
    (reply,) = rig.take()
    assert isinstance(reply, wire.Failed) and (reply.code, reply.field) == ("invalid_request", "temperature")
    assert not rig.deltas
    rig.check_idle()


def test_a_prompt_alone_gives_no_token(rig: FrontRig) -> None:
    rig.generate("r", PROMPT, sampling=SamplingParams(max_tokens=0))
    (running,) = rig.launched
    rig.accept(running)
    rig.say(running, 7, finish="length")
    rig.take()
    (delta,) = rig.deltas
    assert delta.token_ids == [] and delta.finished is not None and delta.finished.reason == "length"


def test_time_ends_a_stream_and_takes_it_from_vllm(rig: FrontRig) -> None:
    rig.generate("r", PROMPT)
    (running,) = rig.launched
    rig.accept(running)
    rig.poll(after_s=61.0)
    rig.take()
    finished = rig.deltas[-1].finished
    assert finished is not None and finished.code == "deadline_exceeded"
    assert rig.cancelled == [running]
    rig.say(running, 5)
    rig.take()
    assert len(rig.deltas) == 1, "who is over says no more"
    rig.check_idle()


def test_an_abort_ends_without_a_word(rig: FrontRig) -> None:
    rig.generate("r", PROMPT)
    (running,) = rig.launched
    rig.accept(running)
    rig.say(running, 5)
    rig.abort("r")
    assert rig.cancelled == [running] and not rig.deltas
    rig.check_idle()


def test_an_abort_answers_a_call_that_waits_for_vllm(rig: FrontRig) -> None:
    rig.generate("r", PROMPT)
    rig.abort("r")
    assert sorted(type(each).__name__ for each in rig.replies) == ["Done", "Failed"]
    rig.accept(rig.launched[0])
    assert not rig.take() and rig.cancelled == rig.launched
    rig.check_idle()


def test_a_draining_engine_takes_no_new_work(rig: FrontRig) -> None:
    rig.state.draining = True
    with pytest.raises(Draining):
        rig.generate("r", PROMPT)


# --- grants ------------------------------------------------------------------------------------------


def test_a_receive_is_taken_when_the_last_writer_has_let_go(rig: FrontRig) -> None:
    grant = rig.granted("r", PROMPT, 14, matched=4)
    receive = rig.launched[0].receive_id
    assert receive is not None and (grant.matched, grant.end, len(grant.blocks)) == (4, 14, 3)
    writer = rig.writer(grant)
    assert rig.generate("r", PROMPT, begin=14, grant_id=grant.grant_id) is None
    running = rig.launched[1]
    assert running.ask == Generate(receive), "vLLM has it at once, and waits by itself"
    rig.accept(running)
    rig.put(writer, grant)
    rig.poll()
    assert rig.fate(receive) == WAIT, "its writer could still write"
    writer.finish()
    rig.poll()
    assert rig.fate(receive) == TAKE
    rig.received(receive)
    rig.say(running, 5, finish="length")
    assert rig.fate(receive) == DROP, "nobody needs the pin any more"
    rig.say(rig.launched[0], 9, finish="length")
    rig.freed(receive)
    rig.take()
    finished = rig.deltas[-1].finished
    assert finished is not None
    assert (finished.usage.cached_tokens, finished.usage.received_tokens) == (4, 10)
    rig.check_idle()


def test_a_grant_is_asked_for_once(rig: FrontRig) -> None:
    assert rig.prep("r", PROMPT, 14) is None and rig.prep("r", PROMPT, 14) is None
    rig.allocate(rig.launched[0])
    first, second = rig.take()
    assert isinstance(first, wire.Granted) and isinstance(second, wire.Granted)
    again = rig.prep("r", PROMPT, 14)
    assert isinstance(again, wire.Granted) and first.grant == second.grant == again.grant
    assert len(rig.launched) == 1
    with pytest.raises(InvalidInterval):
        rig.prep("r", PROMPT, 8)


def test_kv_of_another_class_marks_the_answer(rig: FrontRig) -> None:
    grant = rig.granted("r", PROMPT, 14)
    rig.generate("r", PROMPT, begin=14, grant_id=grant.grant_id, numerics="cpu1-bf16")
    rig.send(grant)
    rig.poll()
    rig.say(rig.launched[1], 5, finish="length")
    rig.take()
    finished = rig.deltas[-1].finished
    assert finished is not None and finished.numerics.name == "mixed"


def test_the_senders_token_is_part_of_what_vllm_goes_on_from(rig: FrontRig) -> None:
    grant = rig.granted("r", PROMPT, 14)
    reply = rig.generate("r", PROMPT, begin=14, grant_id=grant.grant_id, await_first=True)
    assert isinstance(reply, wire.Accepted) and len(rig.launched) == 1
    rig.send(grant, first_token=42)
    rig.poll()
    running = rig.launched[1]
    assert running.token_ids == [*PROMPT, 42] and running.sampling["max_tokens"] == 3
    rig.accept(running)
    rig.say(running, 5, finish="length")
    assert not rig.take(), "its call was answered long ago"
    assert rig.deltas[0].offset == 1, "the router has the first one from the sender"
    assert rig.deltas[0].finished is not None and rig.deltas[0].finished.usage.output_tokens == 2


@pytest.mark.parametrize(("token", "max_tokens", "reason"), [(2, 4, "stop"), (42, 1, "length")])
def test_a_first_token_that_is_the_last_one_needs_no_vllm(
    rig: FrontRig, token: int, max_tokens: int, reason: str
) -> None:
    grant = rig.granted("r", PROMPT, 14)
    receive = rig.launched[0].receive_id
    assert receive is not None
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    rig.generate("r", PROMPT, begin=14, grant_id=grant.grant_id, await_first=True, sampling=sampling)
    rig.send(grant, first_token=token)
    rig.poll()
    rig.take()
    assert len(rig.launched) == 1 and rig.fate(receive) == TAKE
    finished = rig.deltas[-1].finished
    assert finished is not None and finished.reason == reason
    rig.received(receive)
    assert rig.fate(receive) == DROP, "what came is cached, and pinned for nobody"
    rig.say(rig.launched[0], 9, finish="length")
    rig.freed(receive)
    rig.check_idle()


GUIDED = SamplingParams(max_tokens=8, grammar=Grammar(kind="regex", text="a+"))


def test_a_grammar_goes_on_behind_a_first_token(rig: FrontRig) -> None:
    grant = rig.granted("r", PROMPT, 14)
    receive = rig.launched[0].receive_id
    assert receive is not None
    rig.generate("r", PROMPT, begin=14, grant_id=grant.grant_id, await_first=True, sampling=GUIDED)
    rig.send(grant, first_token=42)
    rig.poll()
    assert rig.launched[1].ask == Generate(receive, output=1)


def test_a_grammar_goes_on_with_a_continued_stream(rig: FrontRig) -> None:
    rig.generate("r", PROMPT, sampling=GUIDED, num_output_tokens=3)
    assert rig.launched[0].ask == Generate(-1, output=3)


def test_a_commit_is_answered_when_vllm_has_cached_it(rig: FrontRig) -> None:
    grant = rig.granted("r", PROMPT, 14)
    receive = rig.launched[0].receive_id
    assert receive is not None
    rig.commit("r", grant)
    rig.send(grant)
    rig.poll()
    assert rig.fate(receive) == TAKE and not rig.take()
    rig.received(receive)
    (reply,) = rig.take()
    assert isinstance(reply, wire.Committed) and reply.num_tokens == 12, "whole blocks"
    assert rig.fate(receive) == DROP
    rig.freed(receive)
    rig.check_idle()


def test_a_commit_waits_for_the_events_that_tell_of_it(rig: FrontRig) -> None:
    told: list[list[int]] = []
    rig.receives.is_told = lambda tokens, salt, adapter: tokens in told
    grant = rig.granted("r", PROMPT, 14)
    receive = rig.launched[0].receive_id
    assert receive is not None
    rig.commit("r", grant)
    rig.send(grant)
    rig.poll()
    rig.received(receive)
    assert not rig.take() and rig.fate(receive) == TAKE
    told.append(PROMPT[:12])
    rig.poll()
    assert [type(each) for each in rig.take()] == [wire.Committed] and rig.fate(receive) == DROP
    rig.freed(receive)
    rig.check_idle()


def test_an_empty_grant(rig: FrontRig) -> None:
    reply = rig.prep("r", PROMPT, 0)
    assert isinstance(reply, wire.Granted) and reply.grant.blocks == []
    rig.generate("r", PROMPT, begin=0, grant_id=reply.grant.grant_id)
    rig.poll()
    rig.say(rig.launched[0], 5, finish="length")
    rig.poll()
    rig.check_idle()


def test_blocks_that_a_writer_can_reach_are_not_given_back(rig: FrontRig) -> None:
    grant = rig.granted("r", PROMPT, 14)
    receive = rig.launched[0].receive_id
    assert receive is not None
    writer = rig.writer(grant)
    rig.abort("r")
    rig.poll()
    assert rig.cancelled == [rig.launched[0]], "vLLM need not wait for it"
    assert rig.fate(receive) == WAIT and rig.receives.pool.num_quarantined == len(grant.blocks)
    writer.fail()
    rig.poll()
    assert rig.fate(receive) == DROP and rig.receives.pool.num_quarantined == 0
    rig.freed(receive)
    rig.check_idle()


def test_a_writer_that_dies_frees_them_and_fails_the_stream(rig: FrontRig) -> None:
    grant = rig.granted("r", PROMPT, 14)
    receive = rig.launched[0].receive_id
    assert receive is not None
    rig.generate("r", PROMPT, begin=14, grant_id=grant.grant_id)
    rig.accept(rig.launched[1])
    writer = rig.writer(grant)
    writer.fail()
    rig.poll()
    rig.take()
    finished = rig.deltas[-1].finished
    assert finished is not None and finished.code == "transfer_failed"
    assert rig.fate(receive) == DROP and set(rig.cancelled) == set(rig.launched)
    rig.freed(receive)
    rig.check_idle()


def test_a_receive_that_is_taken_stays_so_until_the_worker_has_seen_it(rig: FrontRig) -> None:
    grant = rig.granted("r", PROMPT, 14)
    receive = rig.launched[0].receive_id
    assert receive is not None
    rig.generate("r", PROMPT, begin=14, grant_id=grant.grant_id)
    rig.send(grant)
    rig.poll()
    rig.abort("r")
    assert rig.fate(receive) == TAKE, "or its request would be parked for ever"
    rig.received(receive)
    assert rig.fate(receive) == DROP
    rig.say(rig.launched[0], 9, finish="length")
    rig.freed(receive)
    rig.check_idle()


def test_nobody_builds_on_it_in_time(rig: FrontRig) -> None:
    rig.granted("r", PROMPT, 14)
    receive = rig.launched[0].receive_id
    assert receive is not None
    rig.poll(after_s=6.0)
    assert rig.fate(receive) == DROP and rig.state.counters["grants_expired"] == 1
    rig.freed(receive)
    rig.check_idle()


def test_vllm_has_no_blocks_in_time(rig: FrontRig) -> None:
    assert rig.prep("r", PROMPT, 14) is None
    rig.poll(after_s=ALLOCATE_S)
    (reply,) = rig.take()
    assert isinstance(reply, wire.Failed) and reply.code == "grants_full" and reply.retry_after_s > 0
    receive = rig.allocate(rig.launched[0])  # its word was under way
    assert not rig.take() and rig.fate(receive) == DROP
    rig.freed(receive)
    rig.check_idle()


def test_vllm_gives_up_a_request_that_is_parked(rig: FrontRig) -> None:
    grant = rig.granted("r", PROMPT, 14)
    receive = rig.launched[0].receive_id
    assert receive is not None
    rig.generate("r", PROMPT, begin=14, grant_id=grant.grant_id)
    rig.accept(rig.launched[1])
    rig.say(rig.launched[0], finish="abort")
    rig.take()
    finished = rig.deltas[-1].finished
    assert finished is not None and finished.code == "transfer_failed"
    assert rig.fate(receive) == DROP
    rig.freed(receive)
    rig.check_idle()


def test_what_waits_for_kv_pins_half_of_the_pool_at_most(rig: FrontRig) -> None:
    long = [3] * 38
    rig.granted("a", long, 38)
    with pytest.raises(Exception, match="wait for KV already"):
        rig.prep("b", long, 38)


def test_more_than_half_of_the_pool_is_too_long(rig: FrontRig) -> None:
    rig.state.limits = type(rig.state.limits)(200, 100, 24, 16, frozenset({2}))
    with pytest.raises(PromptTooLong):
        rig.prep("b", [3] * 60, 60)
