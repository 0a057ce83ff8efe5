"""As many engines as WIRE.md promises: each is answered, and one more is told why it is not."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from microserve.protocol.messages.index import IndexFailed, Register, Registered
from microserve.services.index.membership import MAX_MEMBERS
from tests.support.index.index_service import Index, with_index
from tests.support.index.index_world import ANY, World, make_info, until

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """What the runner of services takes: all that may be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 16_384:
        pytest.skip("this machine does not allow 16,384 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_1024_engines_are_answered_and_one_more_is_refused_with_the_reason() -> None:
    async def test(world: World, index: Index) -> None:
        silent = world.bus.server(ANY, lambda peer, frames: None)
        events = world.bus.publisher(ANY)
        peer = index.peer()
        for number in range(MAX_MEMBERS + 1):
            peer.send(
                Register(
                    number + 1,
                    make_info(f"e{number}", address=silent.address, events_address=events.address),
                )
            )
            if number % 64 == 0:  # who asks without reading an answer is cut off on a busy machine
                await until(lambda sent=number + 1: len(peer.replies) == sent, 120.0)  # type: ignore[misc]
        await until(lambda: len(peer.replies) > MAX_MEMBERS, 120.0)
        assert [type(each) for each in peer.replies] == [Registered] * MAX_MEMBERS + [IndexFailed]
        last = peer.replies[-1]
        assert isinstance(last, IndexFailed)
        assert (last.code, last.detail) == ("queue_full", "1024 engines are in the mesh already")

    with_index(test, interval_s=0.25, liveness=1000)
