"""A mesh under ``microserve up`` that is hurt in every way that costs no process: and the account of it.

    the disk of logs and state   full for a while, freed, full again
    descriptors                  every service has as many as it may, for a while
    refusals                     a thousand requests a second for a path that is not there
    bodies                       31 MB of nothing, one a second
    an engine                    killed as soon as it is ready, again and again

Meanwhile streams are asked for, and each is compared with what ``transformers`` says of its prompt. Needs
root: the disk is a small tmpfs. Owns what is done and what is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer

from microserve.protocol import log
from microserve.services.local.directory import ChildState, MeshDirectory
from tests.support.chaos.cases import Question, keep_stable
from tests.support.chaos.hurt_mesh import (
    READY_S,
    connection,
    engine_pid,
    fill,
    is_ready,
    pids,
    read_answer,
    running_mesh,
    small_disk,
)
from tests.support.process.cases import make_cases
from tests.support.process.exactness import oracle

ANSWER_S = 120.0
"""For one stream: what waits for a descriptor or for an engine comes later, and is not lost."""
BODY_S = 30.0
MAX_BODIES = 12
"""On their way at a time; their sender is in one loop with those who are served."""
SICK = "engine-e2"
STRATEGIES = ("auto", "data_parallel", "disaggregated", "balanced")
BODY = b'{"model":"tiny","max_tokens":1,"prompt":[' + b",".join([b"[]"] * 10_400_000) + b"]}"
"""31 MB of JSON, and no prompt in it."""
REFUSAL = b"GET /%1b]0;x%07 HTTP/1.1\r\nhost: here\r\n\r\n"


@dataclass(frozen=True)
class Hurt:
    """What to do; rates are a second."""

    model: Path
    seconds: float
    streams: float = 8.0
    refusals: int = 1000
    bodies: float = 1.0
    period_s: float = 10.0
    """Full and freed, used up and freed: each for half of it."""


@dataclass
class Account:
    counts: Counter[str] = field(default_factory=Counter)
    worst_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Each of these is a promise that was not kept."""
    log_nbytes: int = 0

    def table(self) -> str:
        ttft = sorted(self.ttft_s) or [0.0]
        lines = [f"  {name:32} {count}" for name, count in sorted(self.counts.items())]
        lines += [
            f"  {'first token, median, s':32} {ttft[len(ttft) // 2]:.3f}",
            f"  {'first token, p99, s':32} {ttft[len(ttft) * 99 // 100]:.3f}",
            f"  {'longest stream, s':32} {self.worst_s:.1f}",
            f"  {'logs at the end, MB':32} {self.log_nbytes / 2**20:.1f}",
            *(f"  BROKEN {problem}" for problem in self.problems[:20]),
        ]
        return "\n".join([*lines, f"{len(self.problems)} BROKEN" if self.problems else "nothing was hurt"])


def run_hurt(hurt: Hurt, directory: Path) -> Account:
    """Start, hurt, stop and count. Raises ``PermissionError`` without the right to mount."""
    cases = [case for case in make_cases(60, vocab_size=300, max_prompt=200, seed=1) if case.greedy]
    tokenizer = Tokenizer.from_file(str(hurt.model / "tokenizer.json"))
    questions = [
        Question(case, tuple(tokens), tokenizer.decode(tokens, skip_special_tokens=True))
        for case, tokens in zip(cases, oracle(hurt.model, cases), strict=True)
        if tokens is not None
    ]
    questions = keep_stable(questions, hurt.model)
    with small_disk(directory / "disk") as disk, running_mesh(hurt.model, disk) as mesh:
        return asyncio.run(_Run(hurt, disk, mesh, questions).go())


class _Run:
    def __init__(self, hurt: Hurt, disk: Path, mesh: MeshDirectory, questions: list[Question]) -> None:
        state = mesh.read()
        assert state is not None
        self._hurt = hurt
        self._disk = disk
        self._mesh = mesh
        self._questions = questions
        self._url = state.url
        self._before = pids(state)
        self._supervisor = state.pid
        self._ends_at = time.monotonic() + hurt.seconds
        self._num_bodies = 0
        self.account = Account()

    async def go(self) -> Account:
        account, hurt = self.account, self._hurt
        account.counts["questions"] = len(self._questions)
        async with asyncio.TaskGroup() as tasks:
            for work in (self._fill_disk, self._use_up_descriptors, self._kill, self._send_bodies):
                tasks.create_task(work())
            for _ in range(4):
                tasks.create_task(self._refuse(hurt.refusals / 4))
            await self._ask(tasks)
        await self._judge()
        return account

    def _is_over(self) -> bool:
        return time.monotonic() >= self._ends_at

    # --- what is asked for -------------------------------------------------------------------------

    async def _ask(self, tasks: asyncio.TaskGroup) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        client = httpx.AsyncClient(base_url=self._url, timeout=ANSWER_S, limits=limits)
        number, began = 0, time.monotonic()
        async with client, asyncio.TaskGroup() as streams:
            while not self._is_over():
                streams.create_task(self._stream(client, number))
                number += 1
                await asyncio.sleep(max(0.0, began + number / self._hurt.streams - time.monotonic()))

    async def _stream(self, client: httpx.AsyncClient, number: int) -> None:
        question = self._questions[number % len(self._questions)]
        asked_at, counts = time.monotonic(), self.account.counts
        counts["streams"] += 1
        while True:
            text, status = "", 0
            try:
                text, status = await self._answer(client, question, STRATEGIES[number % len(STRATEGIES)])
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self._broken("lost", f"{type(error).__name__}: {error}")
                return
            if status not in (429, 503):
                break
            counts["told to retry"] += 1
            if time.monotonic() - asked_at > ANSWER_S:
                self._broken("lost", f"refused for {ANSWER_S:g} s: {text}")
                return
            await asyncio.sleep(1.0)
        self.account.worst_s = max(self.account.worst_s, time.monotonic() - asked_at)
        if status != httpx.codes.OK:
            self._broken("lost", f"{status}: {text}")
        elif text != question.text:
            self._broken("wrong", f"{text!r}, not {question.text!r}")
        else:
            counts["right"] += 1

    async def _answer(self, client: httpx.AsyncClient, question: Question, strategy: str) -> tuple[str, int]:
        body = {
            **{"model": "tiny", "prompt": list(question.case.prompt), "stream": True, "temperature": 0.0},
            **{"max_tokens": question.case.params.max_tokens, "ignore_eos": True},
        }
        asked_at, parts, ended = time.monotonic(), list[str](), False
        headers = {"x-microserve-strategy": strategy}
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
            if reply.status_code != httpx.codes.OK:
                return (await reply.aread()).decode(errors="replace")[:300], reply.status_code
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ValueError(f"{event['error']}")
                    if not parts:
                        self.account.ttft_s.append(time.monotonic() - asked_at)
                    parts += [choice["text"] for choice in event["choices"]]
        if not ended:
            raise ValueError("the stream ended before [DONE]")
        return "".join(parts), httpx.codes.OK

    def _broken(self, kind: str, detail: str) -> None:
        self.account.counts[kind] += 1
        self.account.problems.append(f"{kind}: {detail[:300]}")

    # --- what hurts --------------------------------------------------------------------------------

    async def _fill_disk(self) -> None:
        ballast = self._disk / "ballast"
        while not self._is_over():
            fill(ballast)
            self.account.counts["disk filled"] += 1
            await asyncio.sleep(self._hurt.period_s / 2)
            ballast.unlink()
            await asyncio.sleep(self._hurt.period_s / 2)

    async def _use_up_descriptors(self) -> None:
        """Each service keeps what it has open, and gets nothing more."""
        while not self._is_over():
            await asyncio.sleep(self._hurt.period_s / 2)
            limits = {}
            for name, pid in self._before.items():
                if name == SICK:
                    continue
                with contextlib.suppress(OSError):
                    highest = max(map(int, os.listdir(f"/proc/{pid}/fd")))
                    limits[pid] = resource.prlimit(pid, resource.RLIMIT_NOFILE)
                    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, limits[pid][1]))
            self.account.counts["descriptors used up"] += 1
            await asyncio.sleep(self._hurt.period_s / 2)
            for pid, limit in limits.items():
                with contextlib.suppress(OSError):
                    resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)

    async def _refuse(self, rate: float) -> None:
        """Many requests in one write, so that it is the gateway that works."""
        batch = max(1, round(rate / 10))
        while not self._is_over():
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                async with connection(self._url) as (reader, writer):
                    while not self._is_over():
                        due = time.monotonic() + 0.1
                        writer.write(REFUSAL * batch)
                        await writer.drain()
                        for _ in range(batch):
                            await read_answer(reader)
                            self.account.counts["refusals"] += 1
                        await asyncio.sleep(max(0.0, due - time.monotonic()))
            await asyncio.sleep(0.1)

    async def _send_bodies(self) -> None:
        """One after the other as said, whether or not those before have been answered."""
        async with asyncio.TaskGroup() as sending:
            while not self._is_over():
                if self._num_bodies < MAX_BODIES:
                    sending.create_task(self._send_body())
                await asyncio.sleep(1.0 / self._hurt.bodies)

    async def _send_body(self) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: {len(BODY)}\r\n\r\n".encode()
        self._num_bodies += 1
        try:
            async with asyncio.timeout(BODY_S), connection(self._url) as (reader, writer):
                writer.write(head)
                for begin in range(0, len(BODY), 1 << 20):
                    writer.write(BODY[begin : begin + (1 << 20)])
                    await writer.drain()
                self.account.counts[f"bodies of 31 MB: {await read_answer(reader)}"] += 1
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            self.account.counts["bodies of 31 MB: not answered"] += 1  # nobody promised that they are
        finally:
            self._num_bodies -= 1

    async def _kill(self) -> None:
        killed = 0
        while not self._is_over():
            pid = engine_pid(self._supervisor)
            if pid and pid != killed and is_ready(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed = pid
                    self.account.counts["engine killed"] += 1
            await asyncio.sleep(0.25)

    # --- the account -------------------------------------------------------------------------------

    async def _judge(self) -> None:
        (self._disk / "ballast").unlink(missing_ok=True)
        deadline = time.monotonic() + READY_S
        while True:
            state = self._mesh.read()
            if (
                state is not None
                and not state.stale
                and all(child.state == "ready" for child in state.children)
            ):
                break
            if time.monotonic() > deadline:
                self.account.problems.append(f"not whole again: {state}")
                return
            await asyncio.sleep(0.2)
        children = {child.name: child for child in state.children if child.name != SICK}
        for name, child in children.items():
            if child.pid != self._before[name] or child.restarts:
                self.account.problems.append(f"ended: {name} {child.detail}")
        self.account.counts["processes ended, but the sick one"] = sum(
            child.pid != self._before[name] for name, child in children.items()
        )
        self._read_logs(list(children.values()))

    def _read_logs(self, children: list[ChildState]) -> None:
        self.account.log_nbytes = sum(path.stat().st_size for path in (self._disk / "mesh/logs").iterdir())
        for child in children:
            for line in Path(child.log).read_text().splitlines():
                event: dict[str, Any] = json.loads(line)
                if event["event"] in (log.LOG_DROPPED, log.LOG_SAMPLED, log.HTTP_PAUSED, log.TURN_FAILED):
                    count = event.get("count", event.get("left_out", 1))
                    self.account.counts[f"in logs: {event['event']}"] += count
                if event["event"] == log.STEP_FAILED:
                    self.account.problems.append(f"{child.name}: {line[:300]}")
