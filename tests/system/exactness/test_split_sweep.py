"""Every split border on real engine processes, with prefix-cache hits on sender and receiver: tokens and
log-probabilities have the bits of the request alone on one engine, in fp32 as tokens transformers'."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine.engine_client import EngineClient
from tests.support.process.bitwise import bits_of
from tests.support.process.cases import Case
from tests.support.process.exactness import oracle
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

LENGTHS = [1, 15, 16, 17, 257, 1023]
BLOCK = 16
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=2)
Bits = tuple[list[int], list[Any]]
"""Of an answer: its tokens, and its log-probabilities."""


def borders(length: int) -> list[int]:
    """0, +-1 around block edges (for long prompts: the first, a middle and the last edges), len-1, len."""
    edges = list(range(0, length + 1, BLOCK))
    if len(edges) > 8:
        edges = [*edges[:3], edges[len(edges) // 2], *edges[-2:]]
    near = {edge + step for edge in edges for step in (-1, 0, 1)} | {0, length - 1, length}
    return sorted(border for border in near if 0 <= border <= length)


def cached_amounts(length: int) -> list[int]:
    whole = length // BLOCK * BLOCK
    return sorted({0, whole // 2 // BLOCK * BLOCK, whole})


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_border(tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    rng = random.Random(3)
    prompts = {n: [rng.randrange(20, 250) for _ in range(n)] for n in LENGTHS}
    with MeshProcesses(tiny_model, tmp_path, settings=[f"model.dtype={dtype}"]) as mesh:
        alone, checked = asyncio.run(_sweep(mesh, prompts))
    print(f"{checked} splits exact")
    if dtype == "float32":
        cases = [Case(tuple(prompts[n]), GREEDY) for n in LENGTHS]
        assert [tokens for tokens, _ in alone] == oracle(tiny_model, cases)


async def _sweep(mesh: MeshProcesses, prompts: dict[int, list[int]]) -> tuple[list[Bits], int]:
    """Each prompt's answer alone, and how many splits had its bits."""
    bus = ZmqBus(linger_s=0.1)
    expected: list[Bits] = []
    checked = 0
    try:
        async with (
            EngineClient(bus, mesh.services["engine-0"].address) as sender,
            EngineClient(bus, mesh.services["engine-1"].address) as receiver,
        ):
            assert sender.info is not None and receiver.info is not None
            assert sender.info.numerics == receiver.info.numerics
            assert sender.info.numerics.is_exact
            for length, prompt in prompts.items():
                salt = f"{length} alone"
                await sender.call(
                    *(wire.Accepted, wire.StartGenerate, salt, 0, GREEDY, 60.0, None, False, 0, salt),
                    tokens=prompt,
                )
                expected.append(await _answer(sender, salt))
                for there in cached_amounts(length):
                    for here in cached_amounts(length):
                        for border in borders(length):
                            # A salt of its own gives each case an empty cache.
                            salt = f"{length}/{there}/{here}/{border}"
                            got = await _split(sender, receiver, prompt, border, there, here, salt)
                            assert got == expected[-1], salt
                            checked += 1
    finally:
        bus.close()
    return expected, checked


async def _answer(engine: EngineClient, request_id: str) -> Bits:
    """What ``engine`` generates of a request, to its end."""
    tokens, finished = await engine.finished(request_id)
    assert finished.reason == "length", finished
    return tokens, bits_of([each for delta in engine.deltas[request_id] for each in delta.logprobs])


async def _split(
    sender: EngineClient,
    receiver: EngineClient,
    prompt: list[int],
    border: int,
    there: int,
    here: int,
    salt: str,
) -> Bits:
    """Warm both caches, then receive ``[0, border)`` in two sends and compute the rest."""
    length = len(prompt)
    one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    for engine, amount in ((sender, there), (receiver, here)):
        if amount:
            warm = wire.StartGenerate
            await engine.call(
                wire.Accepted, warm, f"w{salt}", 0, one, 60.0, None, False, 0, salt, tokens=prompt[:amount]
            )
            await engine.finished(f"w{salt}")
    request_id = f"r{salt}"
    granted = await receiver.call(wire.Granted, wire.PrepRecv, request_id, border, 60.0, salt, tokens=prompt)
    grant = granted.grant
    assert grant.matched == min(here, border // BLOCK * BLOCK)
    first = border == length and grant.matched < border
    await receiver.call(
        wire.Accepted,
        wire.StartGenerate,
        request_id,
        border,
        GREEDY,
        60.0,
        grant.grant_id,
        first,
        0,
        salt,
    )
    first_token: Bits = ([], [])
    if grant.matched < border:
        # Where two lanes meet is a border too.
        middle = grant.matched + (border - grant.matched) // 2
        await sender.call(
            wire.Sent, wire.RemoteSend, request_id, 0, middle, grant, 0, 60.0, None, salt, tokens=prompt
        )
        sampling = GREEDY if first else None
        sent = await sender.call(
            wire.Sent, wire.RemoteSend, request_id, middle, border, grant, 1, 60.0, sampling, salt
        )
        assert sent.sent == border - middle
        if sent.first_token is not None:
            assert sent.first_logprob is not None
            first_token = [sent.first_token], bits_of([sent.first_logprob])
    rest = await _answer(receiver, request_id)
    await sender.call(wire.Done, wire.Abort, request_id)
    return first_token[0] + rest[0], first_token[1] + rest[1]
