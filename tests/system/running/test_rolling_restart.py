"""Every engine in turn drained and started again under load: no request lost, no token wrong or repeated."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from microserve.protocol import log
from microserve.protocol.bus.transport import ZmqBus
from tests.support.engine.engine_client import EngineClient
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

ENGINES = ["engine-0", "engine-1", "engine-2"]
BY_COMMAND = "engine-1"
"""This one is drained by ``microserve drain``, the others by SIGTERM."""
DRAIN_S = 20.0
BLOCK_SIZE = 16
CONCURRENCY = 8
MAX_TOKENS = 300
STRATEGIES = ["data_parallel", "disaggregated", "balanced", "cache_aware", "migrate", "auto"]


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    sampling: dict[str, Any]
    strategy: str
    n: int = 1


@dataclass
class Answer:
    """Of one choice."""

    text: str = ""
    reason: str | None = None
    logprobs: tuple[float, ...] = ()

    def agrees(self, other: Answer) -> bool:
        """Log-probabilities differ in their last bits by what else was in the batch."""
        return (
            (self.text, self.reason) == (other.text, other.reason)
            and len(self.logprobs) == len(other.logprobs)
            and all(abs(a - b) < 1e-3 for a, b in zip(self.logprobs, other.logprobs, strict=True))
        )


def make_jobs(count: int = 12) -> list[Job]:
    rng = random.Random(5)
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 11, "logprobs": 2},
        {"temperature": 0.8, "seed": 12, "top_p": 0.9},
    ]
    return [
        Job(
            tuple(rng.randrange(20, 250) for _ in range(rng.randrange(20, 200))),
            samplings[number % len(samplings)],
            STRATEGIES[number % len(STRATEGIES)],
            n=2 if number % 6 == 4 else 1,
        )
        for number in range(count)
    ]


class Load:
    """Streams of the unmodified ``openai`` client, so many at once, over and over."""

    def __init__(self, client: openai.AsyncOpenAI, model: str) -> None:
        self._client = client
        self._model = model
        self.jobs = make_jobs()
        self.expected: list[list[Answer]] = []
        self.num_answers = 0
        self._salts = itertools.count()

    async def ask(self, job: Job) -> list[Answer]:
        stream = await self._client.completions.create(
            model=self._model,
            prompt=list(job.prompt),
            max_tokens=MAX_TOKENS,
            stream=True,
            n=job.n,
            extra_headers={"x-microserve-strategy": job.strategy},
            # A namespace each: no engine has the answer from the time before.
            extra_body={"ignore_eos": True, "cache_salt": str(next(self._salts))},
            **job.sampling,
        )
        answers = [Answer() for _ in range(job.n)]
        async for chunk in stream:
            for choice in chunk.choices:
                answer = answers[choice.index]
                answer.text += choice.text
                answer.reason = choice.finish_reason or answer.reason
                if choice.logprobs is not None:
                    answer.logprobs += tuple(choice.logprobs.token_logprobs or ())
        return answers

    async def run(self, stop: asyncio.Event) -> None:
        numbers = itertools.cycle(range(len(self.jobs)))

        async def work() -> None:
            while not stop.is_set():
                number = next(numbers)
                answers = await self.ask(self.jobs[number])
                for answer, expected in zip(answers, self.expected[number], strict=True):
                    assert answer.agrees(expected), self.jobs[number]
                self.num_answers += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(CONCURRENCY):
                tasks.create_task(work())


@pytest.mark.heavy
def test_no_request_notices(tiny_model: Path, tmp_path: Path) -> None:
    settings = [f"engine.drain_s={DRAIN_S}"]
    with MeshProcesses(tiny_model, tmp_path, num_engines=3, gateway=True, settings=settings) as mesh:
        asyncio.run(_roll(mesh))
        lines = [event for event in mesh.events("router") if event["event"] == log.REQUEST_MOVED]
        moved = [int(str(line["tokens"])) for line in lines]
        computed = [int(str(line["computed"])) for line in lines]
        print(f"moved {len(lines)} contexts of {sum(moved)} tokens, computed {sum(computed)} on the way")
        assert moved, "nothing was moved"
        assert {line["source"] for line in lines} <= set(ENGINES)
        assert not [event for event in mesh.events("router") if event["event"] == log.ENGINE_LOST]
        assert max(computed) <= BLOCK_SIZE
        assert all(int(str(line["matched"])) + int(str(line["sent"])) == line["tokens"] for line in lines)
        ends = [event for event in mesh.events("router") if event["event"] == log.REQUEST_FINISHED]
        assert {event["reason"] for event in ends} == {"length"}


async def _roll(mesh: MeshProcesses) -> None:
    base = f"http://127.0.0.1:{mesh.gateway_port}"
    async with httpx.AsyncClient() as http, asyncio.timeout(60):
        while (await http.get(f"{base}/ready")).status_code != 200:
            await asyncio.sleep(0.05)
    await _until(lambda: all(_lives(mesh, name) == 1 for name in ENGINES), "three engines joined")
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", timeout=60, max_retries=0) as client:
        load = Load(client, mesh.model.name)
        load.expected = await asyncio.gather(*map(load.ask, load.jobs))
        stop = asyncio.Event()
        loading = asyncio.create_task(load.run(stop))
        for name in ENGINES:
            await _is_decoding(mesh, name)
            await _leave(mesh, name, loading)
            mesh.start(name, wait=False)
            await _until(lambda: _lives(mesh, name) == 2 or loading.done(), f"{name} is back")  # noqa: B023
        stop.set()
        async with asyncio.timeout(60):
            await loading
    print(f"{load.num_answers} answers, all right")
    assert load.num_answers >= CONCURRENCY


def _lives(mesh: MeshProcesses, name: str) -> int:
    """Lives of an engine that the router has joined."""
    joined = [event for event in mesh.events("router") if event["event"] == log.ENGINE_JOINED]
    return sum(event["engine_id"] == name for event in joined)


async def _is_decoding(mesh: MeshProcesses, name: str) -> None:
    """Wait until several sequences have come some way on one engine."""
    bus = ZmqBus(linger_s=0.1)
    try:
        async with EngineClient(bus, mesh.services[name].address) as engine, asyncio.timeout(60):
            steps = (await engine.stats()).load.num_steps
            while True:
                load = (await engine.stats()).load
                if load.num_running >= 2 and load.num_steps > steps + 100:
                    return
                await asyncio.sleep(0.02)
    finally:
        bus.close()


async def _leave(mesh: MeshProcesses, name: str, loading: asyncio.Task[None]) -> None:
    """Drain one engine; it must end by itself, well within its bound."""
    process, began = mesh.services[name].process, time.monotonic()
    if name == BY_COMMAND:
        code, output = await asyncio.to_thread(_drain_command, mesh, name)
        assert code == 0, output
        assert f"engine {name} has left" in output
    else:
        process.send_signal(signal.SIGTERM)
    await _until(lambda: process.poll() is not None or loading.done(), f"{name} is gone", DRAIN_S / 2)
    if loading.done():
        await loading
    print(f"{name} left in {time.monotonic() - began:.2f} s")
    assert process.returncode == 0
    events = [event["event"] for event in mesh.events(name)]
    assert log.ENGINE_DRAINING in events and log.SERVICE_STOPPED in events


def _drain_command(mesh: MeshProcesses, name: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "microserve.services.command.main", "drain", name]
    command += ["--set", f"index.address={mesh.index_address}", "--timeout", str(DRAIN_S)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


async def _until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"did not come true: {what}") from None
