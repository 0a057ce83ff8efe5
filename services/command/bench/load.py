"""The shell that sends: a loop, a plan, a task a request. One process's share of a run.

Decides nothing about figures. What it does between two requests is as little as can be, and its own lateness
is sampled all along (:class:`Pulse`).
"""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import uvloop

from microserve.services.command.bench.recorder import Recorder
from microserve.services.command.bench.task import CHAT, Health, Load, Outcome, Result, Share, Words
from microserve.services.command.bench.workload.plan import plan
from microserve.services.command.bench.workload.prompts import Planned, Writer
from microserve.services.command.client.endpoint import Endpoint
from microserve.services.command.client.http import Client

PULSE_S = 0.005
CLOCK = time.monotonic
"""Of CLOCK_MONOTONIC, which all processes of a machine share."""

T = TypeVar("T")
Told = Callable[[Outcome], None]


def run(main: Coroutine[Any, Any, T]) -> T:
    """On a loop of libuv."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@contextmanager
def prepared() -> Iterator[None]:
    """As many connections as may be had, and nothing of before to be searched for garbage meanwhile."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Pulse:
    """How late the loop wakes, every :data:`PULSE_S`, and what CPU its thread takes."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lags_s: list[float] = []
        self._began_s, self._cpu_s = CLOCK(), time.thread_time()
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._arm()

    def _arm(self) -> None:
        self._due_s = CLOCK() + PULSE_S
        self._timer = self._loop.call_later(PULSE_S, self._beat)

    def _beat(self) -> None:
        self._lags_s.append(max(0.0, CLOCK() - self._due_s))
        self._arm()

    def stop(self) -> Health:
        if self._timer is not None:
            self._timer.cancel()
        return Health(CLOCK() - self._began_s, time.thread_time() - self._cpu_s, self._lags_s)


class Sender:
    """Sends planned requests to one server."""

    def __init__(self, client: Client, load: Load, words: Words, clock: Callable[[], float] = CLOCK) -> None:
        self._client = client
        self._clock = clock
        self._load = load
        self._writer = Writer(load, words)
        self._path = "/v1/chat/completions" if load.endpoint == CHAT else "/v1/completions"
        self._headers = {"x-microserve-strategy": load.strategy} if load.strategy else {}

    async def send(self, planned: Planned, due_s: float, held_s: float = 0.0) -> Outcome:
        """What became of it; raises nothing."""
        outcome = Outcome(planned.number, due_s, held_s=held_s)
        recorder = Recorder(
            outcome,
            self._clock,
            max_tokens=planned.max_tokens,
            exact_output=self._load.ignore_eos,
            expected_input=self._writer.expected_input(planned),
        )
        body = self._writer.body(planned)
        request = self._client.endpoint.request("POST", self._path, body, self._headers)
        outcome.sent_s = self._clock()
        try:
            async with asyncio.timeout(self._load.timeout_s):
                await self._client.exchange(request, recorder)
        except TimeoutError:
            recorder.give_up(self._load.timeout_s)
        return outcome


async def warm_up(endpoint: Endpoint, load: Load, words: Words, count: int, salt: str) -> list[Outcome]:
    """``count`` requests as the run's will be, with prompts of their own; all at once."""
    client = Client(endpoint)
    try:
        sender = Sender(client, load, words)
        chosen = [each for _, each in zip(range(count), plan(load, salt), strict=False)]
        return list(await asyncio.gather(*(sender.send(each, CLOCK()) for each in chosen)))
    finally:
        await client.close()


async def send_share(
    endpoint: Endpoint, load: Load, words: Words, share: Share, start_s: float, told: Told = lambda _: None
) -> Result:
    """This process's part of the plan, from ``start_s`` on; ``told`` of each outcome as it comes."""
    client = Client(endpoint)
    sender = Sender(client, load, words)
    own = -(-(load.concurrency - share.index) // share.count) if load.concurrency else 0
    places = asyncio.Semaphore(own) if own else None
    outcomes: list[Outcome] = []
    tasks: set[asyncio.Task[None]] = set()

    def is_over(at_s: float) -> bool:
        return 0 < load.duration_s <= at_s - start_s

    async def one(planned: Planned, due_s: float, held_s: float) -> None:
        try:
            outcome = await sender.send(planned, due_s, held_s)
        finally:
            if places is not None:
                places.release()
        outcomes.append(outcome)
        told(outcome)

    await asyncio.sleep(max(0.0, start_s - CLOCK()))
    pulse = Pulse()
    free_s = 0.0
    """When the last request that had to wait for a place had one: till then nobody could be sent."""
    try:
        for planned in _share_of(plan(load), share):
            planned_s = start_s + (planned.at_s or 0.0)
            # By the plan: a sum with the clock's large number is rounded.
            if planned.at_s is not None and 0 < load.duration_s <= planned.at_s:
                break
            # A turn of the loop for each request, so that a crowd of them is read while it is sent.
            await asyncio.sleep(max(0.0, planned_s - CLOCK()))
            if places is not None and places.locked():
                await places.acquire()
                free_s = CLOCK()
            elif places is not None:
                await places.acquire()
            due_s = CLOCK() if planned.at_s is None else max(planned_s, free_s)
            held_s = 0.0 if planned.at_s is None else due_s - planned_s
            if is_over(due_s):
                break
            task = asyncio.create_task(one(planned, due_s, held_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait(tasks)
    finally:
        health = pulse.stop()
        for task in tasks:
            task.cancel()
        await client.close()
    return Result(outcomes, health)


def _share_of(planned: Iterator[Planned], share: Share) -> Iterator[Planned]:
    return (each for each in planned if each.number % share.count == share.index)
