"""Actions with an adapter: both requests of a transfer are made with it, and with no other one's KV."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from microserve.protocol.errors import (
    InvalidRequest,
    MeshError,
    ModelNotFound,
    TransferFailed,
    UnsupportedAction,
)
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.adapter import Adapter
from microserve.protocol.messages.kv.grant import Grant
from tests.support.engine.vllm_front import GREEDY, ROUTER, FrontRig

PROMPT = list(range(3, 17))
SQL, POET = Adapter("sql", "r1"), Adapter("poet", "r2")


@pytest.fixture
def rig() -> Iterator[FrontRig]:
    rig = FrontRig(SQL, POET)
    yield rig
    rig.close()


def grant_of(rig: FrontRig, request_id: str, adapter: str) -> Grant:
    message = wire.PrepRecv(rig.call(), request_id, 12, 60.0, adapter=adapter)
    assert not rig.take(rig.actions.prep_recv(ROUTER, message, PROMPT, rig.now))
    rig.allocate(rig.launched[-1])
    (reply,) = rig.take()
    assert isinstance(reply, wire.Granted)
    return reply.grant


def send(rig: FrontRig, grant: Grant, adapter: str, request_id: str = "r") -> None:
    message = wire.RemoteSend(rig.call(), request_id, 0, 12, grant, 0, 60.0, adapter=adapter)
    rig.take(rig.actions.remote_send(ROUTER, message, PROMPT, rig.now))


def test_what_receives_sends_and_generates_is_asked_for_with_it(rig: FrontRig) -> None:
    grant = grant_of(rig, "r", "sql")
    assert grant.adapter == SQL
    rig.generate("r", PROMPT, begin=12, grant_id=grant.grant_id, adapter="sql")
    sender = FrontRig(POET, SQL)
    try:
        send(sender, grant, "sql")
        assert [running.adapter for running in (*rig.launched, *sender.launched)] == ["sql"] * 3
        send_of_base = sender.launched[:]
        with pytest.raises(TransferFailed, match="adapter: poet@r2 here, sql@r1 there"):
            send(sender, grant, "poet", "another")
        with pytest.raises(TransferFailed, match="adapter: none here, sql@r1 there"):
            send(sender, grant, "", "another")
        assert sender.launched == send_of_base, "nothing is computed for it"
    finally:
        sender.close()


def test_another_revision_of_the_name_is_another_adapter(rig: FrontRig) -> None:
    grant, sender = grant_of(rig, "r", "sql"), FrontRig(Adapter("sql", "another"))
    try:
        with pytest.raises(TransferFailed, match="adapter: sql@another here, sql@r1 there"):
            send(sender, grant, "sql")
        assert not sender.launched
    finally:
        sender.close()


@pytest.mark.parametrize("other", ["", "poet"])
def test_one_request_has_one_adapter(rig: FrontRig, other: str) -> None:
    grant = grant_of(rig, "r", "sql")
    with pytest.raises(InvalidRequest) as caught:
        rig.generate("r", PROMPT, begin=12, grant_id=grant.grant_id, adapter=other)
    assert caught.value.field == "adapter" and "'sql'" in caught.value.detail
    rig.abort("r")


@pytest.mark.parametrize(("adapters", "error"), [((), UnsupportedAction), ((SQL,), ModelNotFound)])
def test_one_that_is_not_there_is_refused_and_leaves_nothing(
    adapters: tuple[Adapter, ...], error: type[MeshError]
) -> None:
    rig = FrontRig(*adapters)
    try:
        with pytest.raises(error) as caught:
            rig.generate("r", PROMPT, adapter="poet", sampling=GREEDY)
        assert caught.value.field == "model" and "poet" in caught.value.detail
        with pytest.raises(error):
            message = wire.PrepRecv(rig.call(), "r", 12, 60.0, adapter="poet")
            rig.actions.prep_recv(ROUTER, message, PROMPT, rig.now)
        assert not rig.launched and not len(rig.state.records)
    finally:
        rig.close()
