"""The prompts that a model is measured with: read, made ids of, and dealt out by lot.

Owns which prompt is for what. Each is for one thing alone: heads are scored by some, the search goes by
others, and what the library says of its profiles comes from those that are held out from both.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.errors import ConfigError, InvalidRequest
from microserve.services.command.bench.workload.traces import Line, read_prompts

MIN_PROMPTS = 4
SHARES = (0.125, 0.375)
"""For scores of heads, and for the search; the others are held out."""


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: Sequence[int]
    answer: tuple[int, ...] = ()
    """What a right answer begins with; empty: nothing is right or wrong."""


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    """Of the file, and a digest of what is in it."""
    calibration: list[Prompt]
    search: list[Prompt]
    held_out: list[Prompt]


def read_workload(
    path: str, model: str, *, as_chat: bool, min_tokens: int, max_tokens: int, num_prompts: int, seed: int
) -> Workload:
    """``as_chat``: a prompt is a user's message. Prompts of fewer tokens than ``min_tokens`` have no KV that
    would travel, and longer ones than ``max_tokens`` would cost too much: both are left out. ``num_prompts``:
    at most so many are taken, by lot; 0: all. Raises :class:`ConfigError`."""
    lines = read_prompts(path)
    prompts = asyncio.run(_prompts(lines, ModelTokenizer.load(model), path, as_chat))
    fitting = [each for each in prompts if min_tokens <= len(each.token_ids) <= max_tokens]
    if len(fitting) < MIN_PROMPTS:
        raise ConfigError(
            f"{path}: {len(fitting)} of {len(prompts)} prompts are of {min_tokens} to {max_tokens} tokens, "
            f"at least {MIN_PROMPTS} are needed",
            field="file",
        )
    random.Random(f"workload {seed}").shuffle(fitting)
    taken = fitting[: num_prompts or None]
    first = max(1, round(SHARES[0] * len(taken)))
    second = first + max(1, round(SHARES[1] * len(taken)))
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    return Workload(f"{Path(path).name} sha256:{digest}", taken[:first], taken[first:second], taken[second:])


async def _prompts(
    lines: Sequence[Line], tokenizer: ModelTokenizer, path: str, as_chat: bool
) -> list[Prompt]:
    most = 1 << 24  # of no use as a bound here: what is too long is left out
    found = []
    for number, line in enumerate(lines, 1):
        messages: list[dict[str, Any]] | None = line.messages
        if messages is None and as_chat:
            messages = [{"role": "user", "content": line.prompt}]
        try:
            if messages is not None:
                ids = await tokenizer.encode_chat(messages, max_tokens=most)
            else:
                [ids] = await tokenizer.encode([line.prompt or ""], add_special_tokens=True, max_tokens=most)
        except InvalidRequest as error:
            raise ConfigError(f"{path}, prompt {number}: {error.detail}", field="file") from None
        found.append(Prompt(ids, tokenizer.ids_of(line.answer or "")))
    return found
