"""Stale and repeated control messages around a grant whose slot and blocks serve another request already.

Each message is delivered before every operation of the new request's transfer. It is refused with an error
that names the field, or changes nothing; the new request's tokens are the oracle's.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import structlog

from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.words import OPEN
from microserve.protocol.errors import InvalidRequest, MeshError, TransferFailed, UnknownRequest
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import MAX_LANES, Grant
from tests.support.engine.core_mesh import GREEDY, ROUTER, Mesh, prompt_of
from tests.support.engine.late_write.late_write import Sender
from tests.support.engine.late_write.receiver import LONG_S, NEXT, OPTIONS, Receiver, oracle

LENGTH = 13


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of transfers log too much."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


class Succession:
    """Request ``old`` was granted and aborted; ``new`` has its slot and its blocks, and ``a`` sends to it."""

    def __init__(self, new_id: str, *, consumed: bool) -> None:
        """``consumed``: the new request's ``StartGenerate`` comes at once, not when all is sent."""
        mesh = self.mesh = Mesh(**OPTIONS)
        self.receiver = Receiver(mesh, receives=False)
        self.core = mesh.b.core
        self.old_prompt, self.new_prompt = prompt_of(LENGTH, seed=1), prompt_of(LENGTH, seed=2)
        self.old = self._grant("old", self.old_prompt)
        self.abort()
        self.new = self._grant(new_id, self.new_prompt)
        assert (self.old.slot, self.old.generation + 1) == (self.new.slot, self.new.generation)
        assert sorted(self.old.blocks) == sorted(self.new.blocks)
        self.new_id, self.consumed = new_id, consumed
        self.sender = Sender(mesh.a)
        self.call = mesh.call()
        self.send_new(self.call)
        if consumed:
            self.start_new()

    def _grant(self, request_id: str, prompt: list[int]) -> Grant:
        message = wire.PrepRecv(self.mesh.call(), request_id, LENGTH, LONG_S)
        return self.core.actions.prep_recv(ROUTER, message, prompt, self.mesh.now).grant

    def start_new(self) -> None:
        self.start(self.new_id, self.new, None)

    def send_new(self, call: int) -> wire.Sent | None:
        message = wire.RemoteSend(call, self.new_id, 0, LENGTH, self.new, 0, LONG_S, GREEDY)
        return self.mesh.a.core.actions.remote_send(ROUTER, message, self.new_prompt, self.mesh.now)

    # --- the messages --------------------------------------------------------------------------------

    def start(self, request_id: str, grant: Grant, prompt: list[int] | None) -> None:
        message = wire.StartGenerate(
            self.mesh.call(), request_id, LENGTH, GREEDY, LONG_S, grant.grant_id, await_first=True
        )
        self.core.actions.start_generate(ROUTER, message, prompt, self.mesh.now)

    def commit(self, request_id: str) -> None:
        message = wire.Commit(self.mesh.call(), request_id, self.old.grant_id, LONG_S)
        self.core.actions.commit(ROUTER, message, self.mesh.now)

    def release(self, request_id: str) -> None:
        message = wire.Release(self.mesh.call(), request_id, self.old.grant_id)
        self.core.actions.release(ROUTER, message, self.mesh.now)

    def abort(self) -> None:
        self.core.actions.abort(ROUTER, wire.Abort(self.mesh.call(), "old"), self.mesh.now)

    def send_elsewhere(self, grant: Grant, lane: int, prompt: list[int]) -> wire.EngineReply:
        """Another engine is told to send by ``grant``, and does so at once as far as it may."""
        helper, call = self.receiver.helper, self.mesh.call()
        message = wire.RemoteSend(call, f"stale{call}", 0, LENGTH, grant, lane, LONG_S, GREEDY)
        helper.core.actions.remote_send(ROUTER, message, prompt, self.mesh.now)
        while helper.step():
            pass
        return helper.replies[call]

    # --- its end -------------------------------------------------------------------------------------

    def advance_to(self, point: int) -> bool:
        """False if the transfer is over before that operation."""
        while len(self.sender.operations) <= point:
            if not self.sender.advance():
                return False
        return True

    def finish(self) -> list[int] | str:
        """The new request's tokens, or why it failed."""
        while self.sender.advance():
            pass
        if not self.consumed:
            self.start_new()
        for _ in range(40):
            self.mesh.now += 0.03
            self.receiver.turn()
        finished = self.mesh.b.finished.get(self.new_id)
        if finished is None or finished.reason != "length":
            return "never ended" if finished is None else finished.detail
        tokens = self.mesh.b.tokens[self.new_id]
        sent = [
            reply
            for engine in (self.mesh.a, self.receiver.helper)
            for reply in engine.replies.values()
            if isinstance(reply, wire.Sent)
        ]
        assert tokens[0] == -1 and sent[0].first_token is not None
        return [sent[0].first_token, *tokens[1:]]

    def close(self) -> None:
        for engine in (self.mesh.a, self.mesh.b, self.receiver.helper):
            engine.assert_clean()
            engine.core.close()


def each_point(new_id: str, *, consumed: bool) -> Iterator[Succession]:
    """A new succession for every operation of its transfer, standing before it, and one after the last."""
    point, is_before = 0, True
    while is_before:
        succession = Succession(new_id, consumed=consumed)
        is_before = succession.advance_to(point)
        yield succession
        point += 1


def contents(succession: Succession) -> bytes:
    """Every byte and word of the receiver's heap."""
    heap = succession.core._heap
    data = heap.read_data(0, heap.layout.data_nbytes)
    return data.tobytes() + heap.load_each(np.arange(heap.words.num_words)).tobytes()


def settle(succession: Succession) -> None:
    assert succession.finish() == list(oracle(tuple(succession.new_prompt), GREEDY.max_tokens))
    succession.close()


REFUSED: dict[str, tuple[type[MeshError], str, Callable[[Succession], None]]] = {
    "start without tokens": (UnknownRequest, "request_id", lambda s: s.start("old", s.old, None)),
    "start with tokens": (UnknownRequest, "grant_id", lambda s: s.start("old", s.old, s.old_prompt)),
    "commit": (UnknownRequest, "grant_id", lambda s: s.commit("old")),
    "commit of another's grant": (UnknownRequest, "grant_id", lambda s: s.commit("new")),
}
IDEMPOTENT: dict[str, Callable[[Succession], None]] = {
    "abort": lambda s: s.abort(),
    "release": lambda s: s.release("old"),
    "release of another's grant": lambda s: s.release("new"),
}


@pytest.mark.parametrize("consumed", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_stale_grant_id_is_refused_by_name(name: str, consumed: bool) -> None:
    error, field, deliver = REFUSED[name]
    for succession in each_point("new", consumed=consumed):
        for _ in range(2):
            with pytest.raises(error) as raised:
                deliver(succession)
            assert raised.value.field == field
            succession.core.check_integrity()
        settle(succession)


@pytest.mark.parametrize("consumed", [False, True])
@pytest.mark.parametrize("name", IDEMPOTENT)
def test_a_late_goodbye_changes_nothing(name: str, consumed: bool) -> None:
    for succession in each_point("new", consumed=consumed):
        for _ in range(2):
            IDEMPOTENT[name](succession)
            succession.core.check_integrity()
        settle(succession)


def test_a_start_with_the_grant_of_an_earlier_life_is_refused_until_the_new_one_has_started() -> None:
    """One request id, two lives: grant ids keep them apart."""
    for succession in each_point("old", consumed=False):
        with pytest.raises(UnknownRequest) as raised:
            succession.start("old", succession.old, None)
        assert raised.value.field == "grant_id"
        with pytest.raises(UnknownRequest) as raised:
            succession.commit("old")
        assert raised.value.field == "grant_id"
        succession.release("old")
        settle(succession)


def test_a_start_with_the_grant_of_an_earlier_life_is_a_repeated_start_afterwards() -> None:
    for succession in each_point("old", consumed=True):
        succession.start("old", succession.old, None)
        succession.release("old")
        settle(succession)


@pytest.mark.parametrize("consumed", [False, True])
@pytest.mark.parametrize("lane", range(MAX_LANES))
def test_a_send_by_a_closed_grant_writes_nothing(lane: int, consumed: bool) -> None:
    """Its slot has been reused, so only the generation in STATE tells; whichever lane it asks for."""
    for succession in each_point("new", consumed=consumed):
        before = contents(succession)
        reply = succession.send_elsewhere(succession.old, lane, succession.old_prompt)
        assert isinstance(reply, wire.Failed) and reply.code == "transfer_failed"
        assert before == contents(succession)
        settle(succession)


def test_a_second_sender_in_the_same_lane_is_refused_or_was_first() -> None:
    for point, succession in enumerate(each_point("new", consumed=True)):
        reply = succession.send_elsewhere(succession.new, 0, succession.new_prompt)
        # Before the first one holds the lane the second takes it, and sends the same.
        assert isinstance(reply, wire.Sent if point == 0 else wire.Failed)
        settle(succession)
        first = succession.mesh.a.replies[succession.call]
        assert isinstance(first, wire.Failed if point == 0 else wire.Sent)


def test_a_repeated_send_is_refused_by_lane_and_answered_again_when_done() -> None:
    for succession in each_point("new", consumed=True):
        call = succession.mesh.call()
        if succession.sender.is_done:
            again = succession.send_new(call)
            sent = succession.mesh.a.replies[succession.call]
            assert isinstance(sent, wire.Sent) and isinstance(again, wire.Sent)
            assert (again.call_id, again.first_token) == (call, sent.first_token)
        elif not succession.sender.is_booking:
            with pytest.raises(InvalidRequest) as raised:
                succession.send_new(call)
            assert raised.value.field == "lane"
        settle(succession)


def test_control_a_sender_that_ignores_the_generation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_open(writer: LaneWriter) -> None:
        if writer._peer.read(writer._peer.words.state(writer._grant.slot)) & 0xFF != OPEN:
            raise TransferFailed("the grant is closed")

    monkeypatch.setattr(LaneWriter, "require_grant_open", is_open)
    ends: Counter[str] = Counter()
    want = list(oracle(tuple(prompt_of(LENGTH, seed=2)), GREEDY.max_tokens))
    for succession in each_point("new", consumed=True):
        succession.send_elsewhere(succession.old, 1, succession.old_prompt)
        got = succession.finish()
        ends["failed" if isinstance(got, str) else "right" if got == want else "wrong"] += 1
    print(f"\n{dict(ends)}")

    # Tags and sums find such bytes before a token is made of them: the request fails where it is not right.
    assert ends["failed"] > 20
    assert not ends["wrong"]


def test_a_sender_frozen_with_a_lane_of_a_free_slot_is_in_nobodys_way() -> None:
    """It came too late, took its lane and was stopped before it could read that its grant is closed."""
    mesh = Mesh(**{**OPTIONS, "num_slots": 2})
    receiver, sender = Receiver(mesh, receives=True), Sender(mesh.a)
    prompt = prompt_of(LENGTH, seed=1)
    message = wire.PrepRecv(mesh.call(), "old", LENGTH, LONG_S)
    grant = mesh.b.core.actions.prep_recv(ROUTER, message, prompt, mesh.now).grant
    send = wire.RemoteSend(mesh.call(), "old", 0, LENGTH, grant, 0, LONG_S, GREEDY)
    mesh.a.core.actions.remote_send(ROUTER, send, prompt, mesh.now)
    sender.advance()
    mesh.b.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "old"), mesh.now)
    mesh.b.assert_clean()
    sender.advance()
    assert sender.operations == ["hold", "read"]

    receiver.occupy()
    for _ in range(60):
        receiver.turn()
    receiver.rest()
    assert len(receiver.occupants) > 4
    assert not receiver.refused
    for occupant in receiver.occupants:
        assert receiver.answer(occupant) == list(oracle(occupant.prompt, NEXT.max_tokens))

    while sender.advance():
        pass
    for engine in (mesh.a, mesh.b, receiver.helper):
        engine.assert_clean()
        engine.core.close()
