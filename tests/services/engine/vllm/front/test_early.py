"""Early starts at the front: when one is due, and what ends it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from microserve.kvcache.grant.writer import LaneWriter
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import Grant
from microserve.services.engine.vllm.front.arrivals import Arrivals
from microserve.services.engine.vllm.front.early import STANDSTILL_S, EarlyStarts, is_due
from microserve.services.engine.vllm.front.running import Pace, Running
from microserve.services.engine.vllm.link import DROP, START, TAKE, WAIT, Arrived, NotArrived
from tests.support.engine.vllm_front import SIZE, SOURCE_BLOCKS, FrontRig

pytestmark = pytest.mark.quick

PROMPT = list(range(3, 17))  # 14 tokens; what is received ends at 8


class Rig(FrontRig):
    def __init__(self) -> None:
        super().__init__()
        self.early = EarlyStarts(
            self.state, self.receives, self.front.page, num_layers=2, block_size=SIZE, max_num_seqs=4
        )
        self.arrivals = Arrivals(self.state, self.receives, 2, self.early)
        self.state.rates.prefill_tokens_per_s = 6.0
        """Its own share, six tokens, takes a second."""

    def begun(self, end: int = 8) -> tuple[Grant, int, Running, LaneWriter]:
        """Both requests are at vLLM, and a writer has claimed its lane."""
        grant = self.granted("r", PROMPT, end)
        parked = self.launched[-1]
        self.accept(parked)
        self.generate("r", PROMPT, begin=end, grant_id=grant.grant_id)
        running = self.launched[-1]
        self.accept(running)
        self.take()
        assert parked.receive_id is not None
        return grant, parked.receive_id, running, self.writer(grant)

    def put_layer(self, writer: LaneWriter, grant: Grant, layer: int) -> None:
        writer.put_layer(layer, SOURCE_BLOCKS, 0, grant.end)

    def started(self) -> tuple[Grant, int, Running, LaneWriter]:
        """It has one layer of two, and starts by the rest that a slower sender would need."""
        grant, receive, running, writer = self.begun()
        self.put_layer(writer, grant, 0)
        self.poll()
        received = running.received
        assert received is not None
        found = self.receives.of(received)
        assert found is not None
        found.pace.num_layers = 2  # as if there were more
        self.poll(after_s=0.1)
        found.pace.num_layers = 1
        assert self.fate(receive) == START
        return grant, receive, running, writer

    def ended(self) -> wire.Finished:
        self.take()
        finished = self.deltas[-1].finished
        assert finished is not None
        return finished


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_all_of_it_arrives_and_is_taken_when_its_writer_has_let_go(rig: Rig) -> None:
    grant, receive, running, writer = rig.started()
    rig.put_layer(writer, grant, 1)
    rig.poll()
    assert rig.fate(receive) == START, "whether it is right, the worker says"
    rig.early.arrived(Arrived(receive))
    rig.say(running, 5)
    rig.say(rig.launched[0], 9, finish="length")  # the parked one has its token
    rig.poll()
    assert rig.fate(receive) == START, "its writer could still write"
    writer.finish()
    rig.poll()
    assert rig.fate(receive) == TAKE
    rig.received(receive)
    rig.freed(receive)
    rig.say(running, 6, finish="length")
    finished = rig.ended()
    assert (finished.reason, finished.usage.received_tokens, finished.usage.output_tokens) == ("length", 8, 2)
    assert rig.state.counters["early_starts"] == 1 and not rig.state.counters["early_starts_failed"]
    assert rig.state.rates.prefill_tokens_per_s == 6.0, "a wait is no rate"
    rig.check_idle()


@pytest.mark.parametrize("told", [True, False])
def test_its_last_token_comes_before_the_writer_lets_go(rig: Rig, told: bool) -> None:
    grant, receive, running, writer = rig.started()
    rig.put_layer(writer, grant, 1)
    if told:
        rig.early.arrived(Arrived(receive))
    rig.say(running, 5, finish="length")
    if not told:
        rig.early.arrived(Arrived(receive))
    rig.say(rig.launched[0], 9, finish="length")
    rig.poll()
    assert rig.ended().reason == "length" and rig.fate(receive) == START
    writer.finish()
    rig.poll()
    assert rig.fate(receive) == TAKE, "it stays in the cache"
    rig.received(receive)
    assert rig.fate(receive) == DROP
    rig.freed(receive)
    rig.check_idle()


def test_a_sender_that_gives_up_ends_its_generation_and_nothing_else(rig: Rig) -> None:
    _, receive, _, writer = rig.started()
    writer.fail()
    rig.poll(after_s=1.0)
    finished = rig.ended()
    assert (finished.reason, finished.code) == ("error", "transfer_failed") and "gave up" in finished.detail
    assert rig.fate(receive) == DROP
    assert rig.launched[0] not in rig.cancelled, "the parked one ends by itself"
    rig.early.not_arrived(NotArrived(receive, "late"), rig.now)
    rig.say(rig.launched[0], finish="error")
    rig.freed(receive)
    rig.check_idle()


def test_what_the_worker_finds_wrong_ends_it(rig: Rig) -> None:
    grant, receive, running, writer = rig.started()
    rig.put_layer(writer, grant, 1)
    rig.early.not_arrived(NotArrived(receive, "layer 1, block 3: tag"), rig.now)
    assert "tag" in rig.ended().detail
    assert rig.fate(receive) == START, "its writer holds its lane: the blocks wait"
    rig.early.arrived(Arrived(receive))
    writer.finish()
    rig.poll()
    assert rig.fate(receive) == DROP
    rig.say(running, finish="error")
    rig.say(rig.launched[0], finish="error")
    rig.freed(receive)
    rig.check_idle()


def test_a_sender_that_stands_still_is_not_waited_for_for_ever(rig: Rig) -> None:
    _, receive, _, writer = rig.started()
    rig.poll(after_s=STANDSTILL_S / 2)
    assert not rig.deltas
    rig.poll(after_s=STANDSTILL_S)
    assert "no layer has come" in rig.ended().detail
    writer.fail()
    rig.poll()
    assert rig.fate(receive) == DROP
    rig.say(rig.launched[0], finish="error")
    rig.freed(receive)
    rig.check_idle()


def test_an_abort_leaves_the_parked_request_to_its_end(rig: Rig) -> None:
    _, receive, running, writer = rig.started()
    rig.abort("r")
    assert rig.cancelled == [running]
    assert rig.fate(receive) == START, "a writer holds its lane"
    writer.fail()
    rig.poll()
    assert rig.fate(receive) == DROP
    rig.say(rig.launched[0], finish="error")
    rig.freed(receive)
    rig.check_idle()


def test_a_parked_request_that_ends_without_a_word_of_its_kv(rig: Rig) -> None:
    grant, receive, _, writer = rig.started()
    rig.put_layer(writer, grant, 1)
    rig.say(rig.launched[0], finish="error")
    rig.poll(after_s=0.5)
    assert not rig.deltas, "the word may be on its way"
    rig.poll(after_s=0.6)
    assert "vLLM has given up" in rig.ended().detail
    writer.finish()
    rig.poll()
    rig.freed(receive)
    rig.check_idle()


@pytest.mark.parametrize(
    ("num_layers", "after_s", "due"),
    [(1, 0.0, False), (1, 9.0, False), (2, 0.25, False), (5, 1.0, False), (6, 1.25, True), (10, 2.25, True)],
)
def test_it_starts_when_its_own_share_takes_as_long_as_the_rest(
    num_layers: int, after_s: float, due: bool
) -> None:
    """A layer each quarter of a second, ten in all; its share takes a second."""
    assert is_due(Pace(num_layers, 50.0, 50.0), 10, 1.0, 50.0 + after_s) == due


@pytest.mark.parametrize(
    "why", ["no rate", "unaligned", "not at vLLM", "no place", "another", "no share", "nothing"]
)
def test_what_starts_early_and_what_does_not(rig: Rig, why: str) -> None:
    end = {"unaligned": 9, "no share": 14}.get(why, 8)
    if why == "another":
        rig.started()
        rig.launched.clear()
        other = PROMPT[::-1]
        grant = rig.granted("s", other, end)
        rig.accept(rig.launched[-1])
        rig.generate("s", other, begin=end, grant_id=grant.grant_id)
        rig.accept(rig.launched[-1])
        writer = rig.writer(grant)
    else:
        grant, _, _, writer = rig.begun(end)
    receive, running = rig.launched[0].receive_id, rig.launched[-1]
    assert receive is not None
    if why == "no rate":
        rig.state.rates.prefill_tokens_per_s = 0.0
    if why == "not at vLLM":
        running.is_accepted = False
    if why == "no place":
        for name in "abc":
            rig.generate(name, PROMPT)
    early = EarlyStarts(
        *(rig.state, rig.receives, rig.front.page), num_layers=3, block_size=SIZE, max_num_seqs=4
    )
    for layer in range(2):
        writer.put_layer(layer, SOURCE_BLOCKS, 0, grant.end)
    received = running.received
    assert received is not None
    early._num_layers = 2
    early.start_if_due(received, running, rig.now)
    assert rig.fate(receive) == (START if why == "nothing" else WAIT)
