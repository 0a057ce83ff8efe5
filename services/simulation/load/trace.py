"""Requests of a trace file: when they come, how long they are, and which prefixes they share.

Reads the format of Mooncake's traces (kvcache-ai/Mooncake, FAST'25): JSON lines, gzip or plain, with
``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``, one for each 512 tokens of the
input, equal where everything up to there is equal. Of our own are ``tenant``, ``priority``, ``attributes``
(``{"user": "a"}``), which strategies see as those of a gateway's request, and ``session``, which they see as
the attribute of that name. Makes token ids of them that share prefixes in the same places; or draws requests
that share nothing. Knows no mesh.
"""

from __future__ import annotations

import gzip
import itertools
import math
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.request.attributes import MAX_NAME_CHARS, MAX_PRIORITY, fault_of_attributes

HASH_TOKENS = 512
"""Tokens that one of a trace's hash ids names."""
MAX_TOKENS = 1 << 20
MAX_HASH_ID = 1 << 31
SESSION = "session"


class Line(msgspec.Struct, frozen=True):
    """One line of the file."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
    output_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=MAX_HASH_ID)]]
    tenant: Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)] = ""
    priority: Annotated[int, msgspec.Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    attributes: dict[str, str] = {}
    session: str | int = ""

    def told(self) -> dict[str, str]:
        """What strategies see of who asks."""
        return self.attributes | ({SESSION: str(self.session)} if self.session != "" else {})


@dataclass(frozen=True)
class TraceRequest:
    """Lengths in real tokens."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...]
    tenant: str = ""
    priority: int = 0
    attributes: tuple[tuple[str, str], ...] = ()
    """Names and values, as a gateway would tell them."""

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens

    def prompt(self, scale: int) -> list[int]:
        """Token ids, one for ``scale`` real ones; equal blocks are equal, and no others are."""
        tokens_a_block = HASH_TOKENS // scale
        tokens: list[int] = []
        for hash_id in self.hash_ids:
            tokens += (hash_id >> 16, hash_id & 0xFFFF)
            tokens += range(tokens_a_block - 2)
        return tokens[: max(1, self.num_prompt_tokens // scale)]

    def num_steps(self, scale: int) -> int:
        """Tokens to generate: the first one is real, each of the others stands for ``scale``."""
        return 1 + -(-(self.num_output_tokens - 1) // scale)


def drawn(num_requests: int, prompt_tokens: float, output_tokens: float, seed: int) -> list[TraceRequest]:
    """Requests of no file, lengths log-normal around their means (a quarter of them), with no common prefix.

    All at 0, so that :func:`arrivals` spreads them by lot: a Poisson process of so many requests."""
    chance, fresh, requests = random.Random(f"drawn {seed}"), itertools.count(), []
    for _ in range(num_requests):
        lengths = [
            mean * chance.lognormvariate(-(0.25**2) / 2, 0.25) for mean in (prompt_tokens, output_tokens)
        ]
        prompt, output = (max(1, round(length)) for length in lengths)
        hash_ids = tuple(islice(fresh, -(-prompt // HASH_TOKENS)))
        requests.append(TraceRequest(0.0, prompt, output, hash_ids))
    return requests


def read_trace(path: str | Path, num_requests: int = 0, longest: int = 0) -> list[TraceRequest]:
    """The first ``num_requests`` (0: all) in order of time, of those with at most ``longest`` tokens of input
    and output together (0: all). Raises :class:`ConfigError` that names the file,
    and the line and field where there is one."""
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if is_gzip else open(path, "rb") as lines:
            fitting = (each for each in _parsed(str(path), lines) if each.num_tokens <= (longest or math.inf))
            read = list(islice(fitting, num_requests or None))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read {path}: {reason}", field="trace") from None
    if not read:
        raise ConfigError(f"{path} has no such requests", field="trace")
    return read


def _parsed(path: str, lines: Iterator[bytes]) -> Iterator[TraceRequest]:
    before = 0.0
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=Line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}, line {number}: {error}", field="trace") from None
        needed = -(-line.input_length // HASH_TOKENS)
        if len(line.hash_ids) != needed:
            raise ConfigError(
                f"{path}, line {number}: {len(line.hash_ids)} hash_ids, an input_length of "
                f"{line.input_length} has {needed} blocks of {HASH_TOKENS}",
                field="trace",
            )
        if line.timestamp < before:
            raise ConfigError(
                f"{path}, line {number}: timestamp {line.timestamp:g} is before the last", field="trace"
            )
        told = line.told()
        if fault := fault_of_attributes(told):
            raise ConfigError(f"{path}, line {number}: attributes: {fault}", field="trace")
        before = line.timestamp
        yield TraceRequest(
            line.timestamp / 1000,
            line.input_length,
            line.output_length,
            tuple(line.hash_ids),
            line.tenant,
            line.priority,
            tuple(told.items()),
        )


def arrivals(requests: Sequence[TraceRequest], load: float, seed: int) -> list[float]:
    """When each request comes, in seconds from 0, so that ``load`` of them come a second.

    Requests of one timestamp are spread by lot (the same for the same seed) until the next timestamp: the
    trace's clock ticks every 3 s, and nobody sends in such gusts.
    """
    rng = random.Random(f"arrivals {seed}")
    groups = [(at_s, len(list(group))) for at_s, group in groupby(requests, key=lambda each: each.at_s)]
    ends = [at_s for at_s, _ in groups[1:]]
    ends.append(2 * ends[-1] - groups[-2][0] if ends else groups[0][0] + 1.0)
    times: list[float] = []
    for (at_s, count), end_s in zip(groups, ends, strict=True):
        times += sorted(rng.uniform(at_s, end_s) for _ in range(count))
    begin_s, span_s = groups[0][0], ends[-1] - groups[0][0]
    stretch = len(requests) / load / span_s
    return [(at_s - begin_s) * stretch for at_s in times]
