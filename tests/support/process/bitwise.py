"""Bits of a mesh against bits of a request alone: tokens and log-probabilities, in whatever dtype.

    alone     one request at a time, each with a cache of its own, on an engine that does nothing else
    crowd     the same under a strategy, many in flight; while an engine is killed, if asked

Owns what is compared and how a difference is told. Only engines of an exact numerics class promise anything
(protocol/messages/numerics.py); whether an answer says so is looked at too. Must not know models.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from microserve.protocol.errors import QueueFull
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.messages.sampling import SamplingParams
from tests.support.bus.gateway_peer import Answer, BusClient

IN_FLIGHT = 16
TTL_S = 600.0


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    params: SamplingParams

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0.0


def with_logprobs(cases: Sequence[Case], count: int = 2) -> list[Case]:
    """The same, and each token tells its log-probability and those of the likeliest others."""
    return [replace(case, params=msgspec.structs.replace(case.params, logprobs=count)) for case in cases]


async def ask(client: BusClient, strategy: str, case: Case, salt: str) -> Answer:
    """Until it is not refused for a full queue."""
    while True:
        answer = await client.generate(list(case.prompt), case.params, strategy=strategy, ttl_s=TTL_S, salt=salt)
        if answer.result.code != QueueFull.code:
            return answer
        # A strategy with a bound refuses what a slow machine would serve late: as a client would.
        await asyncio.sleep(answer.result.retry_after_s or 1.0)


async def alone(client: BusClient, cases: Sequence[Case]) -> list[Answer]:
    """One at a time, and none finds what another one left in a cache."""
    return [await ask(client, "data_parallel", case, f"alone {number}") for number, case in enumerate(cases)]


async def crowd(
    client: BusClient,
    strategy: str,
    cases: Sequence[Case],
    *,
    salt: str = "",
    harm: Callable[[], None] | None = None,
) -> list[Answer]:
    """All, ``IN_FLIGHT`` at a time, in order of the list. ``harm`` runs once, in a thread, when a third of
    them has ended and the others are in flight."""
    gate = asyncio.Semaphore(IN_FLIGHT)
    num_ended = 0
    harming: asyncio.Task[None] | None = None

    async def one(case: Case) -> Answer:
        nonlocal num_ended, harming
        async with gate:
            answer = await ask(client, strategy, case, salt or strategy)
            num_ended += 1
            if harm is not None and harming is None and 3 * num_ended >= len(cases):
                harming = asyncio.create_task(asyncio.to_thread(harm))
            return answer

    answers = list(await asyncio.gather(*map(one, cases)))
    if harming is not None:
        await harming
    return answers


def differences(cases: Sequence[Case], expected: Sequence[Answer], got: Sequence[Answer]) -> list[str]:
    """One line for each answer that has other bits than the one of a request alone, or no promise of them."""
    lines = []
    for number, (case, want, have) in enumerate(zip(cases, expected, got, strict=True)):
        kind = "greedy" if case.greedy else "sampled"
        where = f"case {number} ({kind}, {len(case.prompt)} prompt tokens)"
        if have.reason != "length":
            lines.append(f"{where}: ended with {have.ended}")
        elif have.token_ids != want.token_ids:
            lines.append(f"{where}: another token at output {_first(want.token_ids, have.token_ids)}")
        elif bits_of(have.logprobs) != bits_of(want.logprobs):
            at = _first(*([bits_of([each]) for each in side.logprobs] for side in (want, have)))
            lines.append(f"{where}: another log-probability at output {at}")
        elif promise_of([have]) is None:
            lines.append(f"{where}: the same bits, but {have.result.numerics} promises none")
    return lines


def bits_of(logprobs: Sequence[TokenLogprob]) -> list[tuple[bytes, tuple[tuple[int, bytes], ...]]]:
    return [
        (struct.pack("<d", each.logprob), tuple((token, struct.pack("<d", value)) for token, value in each.top))
        for each in logprobs
    ]


def promise_of(answers: Sequence[Answer]) -> Numerics | None:
    """The exact class that made all of them; None: there is none."""
    classes = {answer.result.numerics for answer in answers}
    one = classes.pop() if len(classes) == 1 else None
    return one if one is not None and one.is_exact else None


def _first(want: Sequence[object], have: Sequence[object]) -> int:
    return next((i for i, (a, b) in enumerate(zip(want, have, strict=False)) if a != b), min(len(want), len(have)))
