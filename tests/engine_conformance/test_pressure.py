"""Bytes and blocks: KV is the same in both heaps, and goes right also where both pools are too small for
what they are given."""

from __future__ import annotations

import pytest

from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine_conformance.answers import (
    GREEDY,
    Answer,
    alone,
    generate,
    make_prompt,
    require_equal,
)
from tests.support.engine_conformance.engine_process import EngineProcess
from tests.support.engine_conformance.heap_reader import kv_of
from tests.support.engine_conformance.pair import Pair
from tests.support.engine_conformance.relay import fresh, relay
from tests.support.engine_conformance.wire_client import RefusedError, WireClient

FULL = ("grants_full", "cache_full", "queue_full")
NUM_RELAYS = 6


@pytest.mark.sample
async def test_bytes_are_equal_in_both_heaps_in_every_layer(pair: Pair) -> None:
    """There, and back after it was evicted at home: what a sends lies in b's blocks, what b sends of these
    in a's."""
    async with pair.connect() as (a, b):
        block, free = a.info.block_size, pair.free_blocks[a.info.engine_id]
        tokens, salt = make_prompt(a.info, 3 * block + 1, "bytes"), fresh("bytes")
        there = await moved(a, b, pair.b, tokens, salt)
        length = max(1, min(free // 4, (a.info.max_model_len - 8) // block)) * block
        for number in range(-(-free * block // length) + 2):
            await generate(
                a, fresh("fill"), make_prompt(a.info, length, f"bytes {number}"), salt=fresh("fill")
            )
        back = await moved(b, a, pair.a, tokens, salt)
        if there is None or back is None:
            pytest.skip("the heaps of these engines cannot be read from here")
        num_layers = a.info.num_layers
        assert len(there) == len(back) == num_layers and 0 < len(back[0]) <= 3
        for layer in range(num_layers):
            assert all(any(each) for each in there[layer]), "a block that was written is not all zero"
            assert back[layer] == there[layer][-len(back[layer]) :], f"layer {layer}"


async def moved(
    sender: WireClient, receiver: WireClient, owner: EngineProcess, tokens: list[int], salt: str
) -> list[list[bytes]] | None:
    """Send the prompt's whole blocks and make them cache; their bytes at the receiver, ``[layer][block]``."""
    request_id, end = fresh("moved"), len(tokens) // sender.info.block_size * sender.info.block_size
    grant = await receiver.prep_recv(request_id, end, tokens[:end], salt=salt)
    await sender.remote_send(request_id, grant.matched, end, grant, tokens[:end], salt=salt)
    # What is put through a door may be under way when it is sent; what is committed is there.
    await receiver.commit(request_id, grant, numerics=sender.info.numerics.name)
    return kv_of(owner, receiver.info, grant, grant.blocks)


async def test_streams_that_outgrow_both_pools_and_relays_between_them_are_each_served(pair: Pair) -> None:
    """Together they need more blocks than there are: whoever runs may lose its own and is computed again,
    senders and receivers of a relay too. A relay is right, or was refused in words."""
    async with pair.connect() as (a, b):
        info, free = b.info, min(pair.free_blocks.values())
        num = min(6, (await b.stats()).load.max_num_seqs - 2)
        share = min(free * info.block_size * 3 // (2 * num), info.max_model_len - 20)
        sampling = SamplingParams(max_tokens=share - 16, temperature=0.0, ignore_eos=True)
        crowd = [(client, fresh("outgrows")) for client in (a, b) for _ in range(num)]
        for client, name in crowd:
            await client.start_generate(name, 0, sampling, make_prompt(info, 16, name))

        prompts = [make_prompt(info, 2 * info.block_size + each, "pressed") for each in range(NUM_RELAYS)]
        answers = []
        for number, tokens in enumerate(prompts):
            sender, receiver = (a, b) if number % 2 else (b, a)
            try:
                answers.append((tokens, (await relay(sender, receiver, tokens, len(tokens))).answer))
            except RefusedError as refused:
                assert refused.code in FULL
        ends = [await client.finished(name, 300.0) for client, name in crowd]
        assert all(len(each.token_ids) == sampling.max_tokens for each in ends)
        assert all(len(answer.token_ids) == GREEDY.max_tokens for _, answer in answers)
        if info.numerics.is_exact:
            for tokens, answer in answers:
                require_equal(answer, await alone(b, fresh("alone"), tokens), info)
            again = await alone(b, fresh("alone"), make_prompt(info, 16, crowd[-1][1]), sampling)
            require_equal(Answer.of(ends[-1]), again, info)
