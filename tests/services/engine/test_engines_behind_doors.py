"""Two engines as processes that share no memory: tokens are those of one engine, and all KV went through a
door."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from microserve.protocol.bus.curve import create_mesh_keys
from tests.support.engine_conformance.answers import make_prompt
from tests.support.engine_conformance.engine_process import Launch
from tests.support.engine_conformance.pair import Pair
from tests.support.engine_conformance.relay import check_relay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {
    "bus.liveness": "20",
    "kvcache.num_blocks": "128",
    "kvcache.checksums": "true",
    "kvcache.share_memory": "false",
    "model.dtype": "float32",
    "engine.max_num_batched_tokens": "64",
}


@pytest.fixture(params=["tcp", *(["nixl"] if find_spec("nixl") is not None else [])])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(kind: str, tiny_model: Path, tmp_path: Path) -> Iterator[Pair]:
    keys = create_mesh_keys(tmp_path / "keys")
    settings = {**SETTINGS, "kvcache.doors": f'["{kind}"]'}
    pair = Pair(Launch(tiny_model, keys, settings=settings), tmp_path)
    pair.start()
    yield pair
    pair.stop()


def test_splits_through_a_door(kind: str, pair: Pair) -> None:
    async def relays() -> None:
        async with pair.connect() as (a, b):
            assert a.info.all_heaps == [kind]
            block = a.info.block_size
            tokens = make_prompt(a.info, 5 * block + 3, "doors")
            for end in (1, block - 1, block, 2 * block + 1, len(tokens) - 1, len(tokens)):
                relayed = await check_relay(a, b, tokens, end)
                assert [each.heap for each in relayed.sent] == [kind]
            relayed = await check_relay(b, a, tokens, len(tokens), num_lanes=2)
            assert [each.heap for each in relayed.sent] == [kind, kind]
            await check_relay(a, b, tokens, len(tokens), generate_first=True, first_token=True)

    asyncio.run(relays())


def test_a_sender_that_is_killed_within_a_send_leaves_nothing(pair: Pair) -> None:
    """The blocks that it could write to come back when the door has seen its end."""

    async def lose() -> None:
        async with pair.bus() as bus:
            clients = [pair.client(bus, engine) for engine in (pair.a, pair.b)]
            for client in clients:
                await client.hello()
            a, b = clients
            tokens = make_prompt(a.info, 6 * a.info.block_size, "lost")
            await check_relay(a, b, tokens, len(tokens))
            grant = await b.prep_recv("lost", len(tokens), make_prompt(a.info, len(tokens), "gone"))
            sending = asyncio.create_task(a.remote_send("lost", 0, len(tokens), grant, tokens))
            await asyncio.sleep(0)  # it is on its way, and how far it comes does not matter
            pair.a.kill()
            await b.release("lost", grant)
            await pair.settled(b)
            sending.cancel()
            await asyncio.wait([sending])

    asyncio.run(lose())
