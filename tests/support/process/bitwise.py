"""Bits of a mesh against bits of a request alone: tokens and log-probabilities, in whatever dtype.

    alone     one request at a time, each with a cache of its own, on an engine that does nothing else
    crowd     the same under a strategy, many in flight; while an engine is killed or drained, if asked

Owns what is compared and how a difference is told. Only engines of an exact numerics class promise anything
(protocol/messages/numerics.py); whether an answer says so is looked at too. Must not know models.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import NoEngines, QueueFull
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.numerics import Numerics
from tests.support.bus.gateway_peer import Answer, BusClient
from tests.support.process.cases import Case
from tests.support.process.processes import MeshProcesses

IN_FLIGHT = 16
TTL_S = 600.0


async def ask(client: BusClient, strategy: str, case: Case, salt: str) -> Answer:
    """Until it is not refused for a full queue, or because every engine is lost just now."""
    while True:
        answer = await client.generate(
            list(case.prompt), case.params, strategy=strategy, ttl_s=TTL_S, salt=salt
        )
        if answer.result.code not in (QueueFull.code, NoEngines.code):
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


async def ask_alone(router_address: str, cases: list[Case]) -> tuple[Numerics | None, list[Answer]]:
    """What one engine promises, and its answers to requests alone; none where it promises nothing."""
    bus = ZmqBus()
    try:
        async with BusClient(bus, router_address) as client:
            await client.wait_engines(1)
            if promise_of(await alone(client, cases[:1])) is None:
                return None, []
            answers = await alone(client, cases)
            return promise_of(answers), answers
    finally:
        bus.close()


async def check_bits(
    mesh: MeshProcesses,
    cases: list[Case],
    reference: list[Answer],
    strategies: list[str],
    harmed: Mapping[str, Sequence[str]],
) -> int:
    """Run every strategy, and those of ``harmed`` (by kind of :data:`HARMS`) once more while that is done to
    an engine; the number of answers with other bits than their reference, each printed."""
    bus = ZmqBus()
    wrong = 0
    runs = [(strategy, "") for strategy in strategies]
    runs += [(strategy, kind) for kind, each in harmed.items() for strategy in each]
    try:
        async with BusClient(bus, mesh.router_address) as client:
            for strategy, kind in runs:
                await client.wait_engines(mesh.num_engines)
                started = time.monotonic()
                harm = partial(HARMS[kind], mesh) if kind else None
                got = await crowd(client, strategy, cases, salt=f"{strategy} {kind}", harm=harm)
                bad = differences(cases, reference, got)
                wrong += len(bad)
                print(
                    f"{strategy:17} {kind:8} {len(cases)} requests, "
                    f"{sum(len(answer.token_ids) for answer in got)} tokens, {len(bad)} differences, "
                    f"{sum(len(answer.result.engines) > 1 for answer in got)} by several engines, "
                    f"{time.monotonic() - started:.0f} s",
                    *bad,
                    sep="\n  ",
                    flush=True,
                )
    finally:
        bus.close()
    return wrong


def _kill(mesh: MeshProcesses) -> None:
    mesh.services["engine-0"].kill()
    mesh.start("engine-0")


def _drain(mesh: MeshProcesses) -> None:
    """Its requests end or move within ``engine.drain_s``; then it comes again."""
    mesh.stop("engine-0")
    mesh.start("engine-0")


HARMS: Mapping[str, Callable[[MeshProcesses], None]] = {"kill -9": _kill, "drain": _drain}


def differences(cases: Sequence[Case], expected: Sequence[Answer], got: Sequence[Answer]) -> list[str]:
    """One line for each answer that has other bits than the one of a request alone, or no promise of them."""
    lines = []
    for number, (case, want, have) in enumerate(zip(cases, expected, got, strict=True)):
        kind = "greedy" if case.greedy else "sampled"
        where = f"case {number} ({kind}, {len(case.prompt)} prompt tokens)"
        if have.reason != want.reason or have.reason not in ("length", "stop"):
            lines.append(f"{where}: ended with {have.ended}")
        elif have.token_ids != want.token_ids:
            lines.append(f"{where}: another token at output {_first(want.token_ids, have.token_ids)}")
        elif bits_of(have.logprobs) != bits_of(want.logprobs):
            at = _first(*([bits_of([each]) for each in side.logprobs] for side in (want, have)))
            lines.append(f"{where}: another log-probability at output {at}")
        elif have.rows != want.rows or (have.rows is None) == _is_told(case):
            lines.append(f"{where}: its prompt is told of in other bits, or not at all")
        elif promise_of([have]) is None:
            lines.append(f"{where}: the same bits, but {have.result.numerics} promises none")
    return lines


def _is_told(case: Case) -> bool:
    """Of its prompt, but for the first token."""
    return case.params.prompt_logprobs is not None and len(case.prompt) > 1


def bits_of(logprobs: Sequence[TokenLogprob]) -> list[tuple[bytes, tuple[tuple[int, bytes], ...]]]:
    return [
        (
            struct.pack("<d", each.logprob),
            tuple((token, struct.pack("<d", value)) for token, value in each.top),
        )
        for each in logprobs
    ]


def promise_of(answers: Sequence[Answer]) -> Numerics | None:
    """The exact class that made all of them; None: there is none."""
    classes = {answer.result.numerics for answer in answers}
    one = classes.pop() if len(classes) == 1 else None
    return one if one is not None and one.is_exact else None


def _first(want: Sequence[object], have: Sequence[object]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(want, have, strict=False)) if a != b), min(len(want), len(have))
    )
