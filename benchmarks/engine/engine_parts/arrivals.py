"""Requests that come by themselves, one after the other at random, and what their clients see.

Owns when they come and how long they are: the same for the same seed. Their tokens are drawn anew each time,
so that no engine knows a prompt from before.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass

import httpx
from engine_parts.serving import TIMEOUT_S, Prompts


@dataclass(frozen=True)
class Coming:
    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True)
class Served:
    """Seconds from sending it."""

    first_s: float
    ended_s: float


def poisson(
    count: int, rate: float, prompt_tokens: int, input_to_output: int, seed: str, spread: float = 0.25
) -> list[Coming]:
    """``rate`` a second; lengths log-normal around their mean, with this ``spread`` of the logarithm."""
    chance, at_s, coming = random.Random(seed), 0.0, []
    for _ in range(count):
        at_s += chance.expovariate(rate)
        length = prompt_tokens * chance.lognormvariate(-(spread**2) / 2, spread)
        coming.append(Coming(at_s, max(1, round(length)), max(2, round(length / input_to_output))))
    return coming


def serve(url: str, coming: list[Coming], prompts: Prompts, strategy: str) -> list[Served]:
    """In their order; raises :class:`RuntimeError` where one is not served whole."""
    drawn = [prompts.draw(1, each.num_prompt_tokens)[0] for each in coming]
    return asyncio.run(_serve(url, coming, drawn, strategy))


async def _serve(url: str, coming: list[Coming], drawn: list[list[int]], strategy: str) -> list[Served]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
        began = time.perf_counter()
        asked = (
            _ask(client, url, each, prompt, began, strategy)
            for each, prompt in zip(coming, drawn, strict=True)
        )
        return await asyncio.gather(*asked)


async def _ask(
    client: httpx.AsyncClient, url: str, coming: Coming, prompt: list[int], began: float, strategy: str
) -> Served:
    body = {"model": "bench", "prompt": prompt, "max_tokens": coming.num_output_tokens, "temperature": 0.0}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    await asyncio.sleep(max(0.0, began + coming.at_s - time.perf_counter()))
    sent, first, counted = time.perf_counter(), 0.0, 0
    headers = {"x-microserve-strategy": strategy}
    async with client.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as response:
        if response.is_error:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"]:
                first = first or time.perf_counter()
            elif event.get("usage"):
                counted = event["usage"]["completion_tokens"]
    if counted != coming.num_output_tokens:
        raise RuntimeError(f"{counted} tokens of {coming.num_output_tokens} came by {strategy}")
    return Served(first - sent, time.perf_counter() - sent)
