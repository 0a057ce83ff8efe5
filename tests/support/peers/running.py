"""A peer as a process, with its output in a file, ended with the test."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

START_S = 120.0


@asynccontextmanager
async def running(command: list[str], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Without a word of ours in its environment; what it said is shown if the test fails."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(log.parent), "NO_PROXY": "127.0.0.1,localhost"}
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE if "reader.py" in " ".join(command) else output,
            stderr=output,
            env=environment,
            cwd=log.parent,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        print(await asyncio.to_thread(log.read_text, errors="replace"))


async def answers(http: httpx.AsyncClient, path: str) -> httpx.Response:
    """The first answer of 200."""
    async with asyncio.timeout(START_S):
        while True:
            try:
                reply = await http.get(path)
                if reply.status_code == 200:
                    return reply
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.05)
