"""A received grant and its holder point to each other, through every way that a grant can go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from microserve.protocol.errors import InternalError
from microserve.protocol.messages import engine as wire
from microserve.services.engine.core.request.received import ReceivedGrant
from tests.support.engine.core_mesh import (
    ROUTER,
    Mesh,
    expect,
    generate,
    grant_for,
    prompt_of,
    receive,
    send,
)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    mesh = Mesh()
    yield mesh
    mesh.close()


def book(mesh: Mesh) -> list[ReceivedGrant]:
    return list(mesh.b.core.memory.received)


def test_a_grant_goes_from_its_record_to_its_sequence_and_is_its_own_once_settled(mesh: Mesh) -> None:
    prompt = prompt_of(30)
    granted = grant_for(mesh.b, "r", prompt, 20)
    record = mesh.b.core.state.records.find(ROUTER, "r")
    assert record is not None
    (received,) = book(mesh)
    assert (received.holder, record.received, received.num_pinned) == (record, received, 5)

    receive(mesh.b, "r", granted, 20)
    assert record.generate is not None
    assert (received.holder, record.received) == (record.generate, None)
    mesh.b.core.check_integrity()

    send(mesh.a, "r", prompt, granted, 0, 20)
    sequence = record.generate
    mesh.run()
    assert (sequence.received, book(mesh)) == (None, [])
    assert expect(prompt) == mesh.b.tokens["r"]


@pytest.mark.parametrize("end", ["release", "lease", "abort", "router lost"])
def test_a_grant_that_ends_has_no_holder_and_others_keep_theirs(mesh: Mesh, end: str) -> None:
    granted = grant_for(mesh.b, "r", prompt_of(30), 20)
    other = grant_for(mesh.b, "other", prompt_of(10, seed=1), 8)
    receive(mesh.b, "other", other, 8)  # no lease is on it any more
    record = mesh.b.core.state.records.find(ROUTER, "r")
    assert record is not None
    actions = mesh.b.core.actions
    match end:
        case "release":
            actions.release(ROUTER, wire.Release(mesh.call(), "r", granted.grant.grant_id), mesh.now)
        case "lease":
            mesh.now += 5.1
            mesh.b.step()
        case "abort":
            actions.abort(ROUTER, wire.Abort(mesh.call(), "r"), mesh.now)
        case "router lost":
            mesh.b.core.state.drop_owner(ROUTER, mesh.now)
    left = [] if end == "router lost" else [other.grant.grant_id]
    assert [received.grant_id for received in book(mesh)] == left
    assert record.received is None
    mesh.b.core.check_integrity()


def test_a_commit_holds_its_grant_until_it_has_settled(mesh: Mesh) -> None:
    prompt = prompt_of(22)
    granted = grant_for(mesh.b, "r", prompt, 22)
    generate(mesh.b, "busy", prompt_of(10, seed=3))  # a commit is found among others
    call = mesh.call()
    mesh.b.core.actions.commit(ROUTER, wire.Commit(call, "r", granted.grant.grant_id, 60.0), mesh.now)
    mesh.b.step()
    assert len(book(mesh)) == 1
    send(mesh.a, "r", prompt, granted, 0, 22)
    mesh.run()
    assert isinstance(mesh.b.replies[call], wire.Committed)
    assert book(mesh) == []


def test_a_forgotten_pointer_is_a_broken_integrity(mesh: Mesh) -> None:
    grant_for(mesh.b, "r", prompt_of(30), 20)
    (received,) = book(mesh)
    received.holder.received = None
    with pytest.raises(InternalError, match="does not know of it"):
        mesh.b.core.check_integrity()
    received.holder.received = received

    mesh.b.core.memory.received.forget(received)
    with pytest.raises(InternalError, match="one book of two"):
        mesh.b.core.check_integrity()
    mesh.b.core.memory.received.add(received)
    mesh.b.core.check_integrity()
