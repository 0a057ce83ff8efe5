"""What vLLM refuses to take leaves nothing behind: its connector, which says when a request is over, never
hears of it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest

from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.protocol.errors import CapacityError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.kind import EngineKind
from microserve.services.engine.vllm.front.asyncllm import Stream
from microserve.services.engine.vllm.front.core import VllmCore
from microserve.services.engine.vllm.front.running import Running
from microserve.services.engine.vllm.link_ends import Front
from microserve.services.engine.vllm.mirror import Mirror
from tests.support.engine.vllm_front import ENDS, NUMERICS, ROUTER, FrontRig, layout_of

pytestmark = pytest.mark.slow

NUM_RECEIVES = 4
PROMPT = list(range(3, 17))


class FullLlm:
    """It takes nothing."""

    is_dead = False

    async def add(self, running: Running) -> Stream:
        raise CapacityError("its queue is full", retry_after_s=1.0)

    def shutdown(self) -> None:
        pass


@pytest.fixture
def core() -> Iterator[VllmCore]:
    heap = MemoryHeap(layout_of(24), incarnation=9, registry=MemoryRegistry(), num_slots=NUM_RECEIVES)
    front = Front(
        incarnation=9,
        model="m",
        revision="r",
        num_receives=NUM_RECEIVES,
        grant_slots=NUM_RECEIVES,
        checksums=True,
    )
    core = VllmCore(
        *(FullLlm(), front, heap, Mirror(4, "m", "r")),
        engine_id="e",
        incarnation=9,
        kind=EngineKind("vllm", "0", ()),
        numerics=NUMERICS,
        limits=Limits(40, 100, 24, 16, ENDS),
        max_num_seqs=8,
        max_num_batched_tokens=64,
        lease_s=5.0,
        checksums=True,
        kernels="",
    )
    yield core
    core.close()


async def failure_of(core: VllmCore) -> wire.Failed:
    answered = asyncio.Event()
    core.on_output = answered.set
    async with asyncio.timeout(20.0):
        await answered.wait()
    ((_, reply),) = core.take_output()[0].replies
    assert isinstance(reply, wire.Failed)
    return reply


def test_blocks_that_vllm_does_not_look_for(core: VllmCore) -> None:
    """More often than there are places for a receive, and than half of the pool has room for."""
    asyncio.run(_blocks(core))


async def _blocks(core: VllmCore) -> None:
    for number in range(2 * NUM_RECEIVES):
        message = wire.PrepRecv(number, f"r{number}", 14, 60.0)
        assert core.actions.prep_recv(ROUTER, message, PROMPT, core.clock()) is None
        assert (await failure_of(core)).code == CapacityError.code
        assert core.load().num_grants == 0
        assert core.state.is_drained(core.clock()), "it may leave"


@pytest.mark.parametrize("sampling", [None, SamplingParams(max_tokens=4)])
def test_a_send_that_vllm_does_not_take(core: VllmCore, sampling: SamplingParams | None) -> None:
    asyncio.run(_send(core, sampling))
    gc.collect()
    kept = [each for each in gc.get_objects() if type(each) is Running and each.request_id == "refused"]
    assert not kept


async def _send(core: VllmCore, sampling: SamplingParams | None) -> None:
    receiver = FrontRig()
    grant = receiver.granted("r", PROMPT, 14)
    message = wire.RemoteSend(1, "refused", 0, 14, grant, 0, 60.0, sampling=sampling)
    assert core.actions.remote_send(ROUTER, message, PROMPT, core.clock()) is None
    assert (await failure_of(core)).code == CapacityError.code
    assert core.state.is_drained(core.clock())
    receiver.close()
