"""Adapters: an engine that has none, or not the one that it is asked for, says so and computes nothing."""

from __future__ import annotations

import pytest

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.engine_info import LORA, PREP_RECV, REMOTE_SEND
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine_conformance.answers import GREEDY
from tests.support.engine_conformance.pair import Pair
from tests.support.engine_conformance.relay import fresh
from tests.support.engine_conformance.wire_client import RefusedError, WireClient

PROMPT = [5 + place % 90 for place in range(70)]
NOBODYS = "nobody's"
"""The name of no adapter."""


async def refused(client: WireClient, action: str, sampling: SamplingParams = GREEDY) -> RefusedError:
    """How it refuses to do so with an adapter that it has not."""
    request_id = fresh("adapter")
    with pytest.raises(RefusedError) as caught:
        if action == "generate":
            await client.start_generate(request_id, 0, sampling, PROMPT, adapter=NOBODYS)
        elif action == "receive":
            await client.prep_recv(request_id, 64, PROMPT, adapter=NOBODYS)
        else:
            grant = await client.prep_recv(request_id, 64, PROMPT)
            try:
                await client.remote_send(request_id, 0, 64, grant, PROMPT, adapter=NOBODYS)
            finally:
                await client.release(request_id, grant)
    return caught.value


@pytest.mark.parametrize("action", ["generate", "receive", "send"])
async def test_an_adapter_that_is_not_there_is_refused_by_name(pair: Pair, action: str) -> None:
    async with pair.connect() as (client, _):
        if action != "generate" and not (client.info.does(PREP_RECV) and client.info.does(REMOTE_SEND)):
            pytest.skip("it exchanges no KV")
        steps = (await client.stats()).load.num_steps
        error = await refused(client, action)
        has_some = client.info.does(LORA) and bool(client.info.adapters)
        assert error.code == ("model_not_found" if has_some else "unsupported_action"), error
        assert error.field == "model" and NOBODYS in error.detail, error
        if action != "send":  # an engine may step while the grant waits, with nothing in its steps
            assert (await client.stats()).load.num_steps == steps, "nothing is computed for it"


async def test_an_engine_says_what_its_adapters_stand_for(pair: Pair) -> None:
    async with pair.connect() as (client, other):
        info, theirs = client.info, other.info
        assert bool(info.adapters) <= info.does(LORA)
        assert all(each.name and each.revision for each in info.adapters)
        names = {each.name: each.revision for each in theirs.adapters}
        assert all(names.get(each.name, each.revision) == each.revision for each in info.adapters)


async def test_a_request_that_is_refused_for_its_adapter_may_come_again_without(pair: Pair) -> None:
    async with pair.connect() as (client, _):
        request_id = fresh("adapter")
        with pytest.raises(RefusedError):
            await client.start_generate(request_id, 0, GREEDY, PROMPT, adapter=NOBODYS)
        await client.start_generate(request_id, 0, GREEDY, PROMPT)
        stream = await client.finished(request_id)
        assert isinstance(stream.finished, wire.Finished) and stream.token_ids
