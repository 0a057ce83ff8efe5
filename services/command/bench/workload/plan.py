"""What is sent and when, request after request. Pure but for the files that are read; a seed decides the
rest.

Every process of a run makes the same plan and sends its share of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice, repeat

from microserve.protocol.errors import ConfigError
from microserve.services.command.bench.task import COMPLETIONS, Load
from microserve.services.command.bench.workload.draw import arrivals, lengths
from microserve.services.command.bench.workload.prompts import Part, Planned
from microserve.services.command.bench.workload.traces import read_prompts, read_requests
from microserve.services.simulation.load import trace
from microserve.services.simulation.load.trace import HASH_TOKENS, TraceRequest


def plan(load: Load, salt: str = "") -> Iterator[Planned]:
    """In the order of their times; of ``num_requests``, or without end where that is 0. ``salt``: prompts
    that no plan of another salt has (prefixes as well). Raises :class:`ConfigError`."""
    planned = _of_trace(load, salt) if load.trace else _of_lengths(load, salt)
    if load.file:
        planned = _of_file(load)
    return islice(planned, load.num_requests or None)


def _times(load: Load) -> Iterator[float | None]:
    return arrivals(load) if load.rate else repeat(None)


def _of_lengths(load: Load, salt: str) -> Iterator[Planned]:
    for number, at_s, (prompt, output) in zip(count(), _times(load), lengths(load), strict=False):
        parts: list[Part] = []
        if load.prefix_len:
            parts.append((f"{salt}prefix {load.seed} {number % load.num_prefixes}", load.prefix_len))
        parts.append((f"{salt}own {load.seed} {number}", prompt))
        yield Planned(number, at_s, output, tuple(parts))


def _of_file(load: Load) -> Iterator[Planned]:
    """Its lines in turn, again and again."""
    lines = read_prompts(load.file)
    for number, at_s in zip(count(), _times(load), strict=False):
        line = lines[number % len(lines)]
        if line.messages is not None and load.endpoint == COMPLETIONS:
            raise ConfigError(f"{load.file} has messages: --endpoint chat", field="file")
        given = line.prompt if line.prompt is not None else line.messages
        yield Planned(number, at_s, line.max_tokens or load.output_len, given=given)


def _of_trace(load: Load, salt: str) -> Iterator[Planned]:
    requests = read_requests(load.trace, load.num_requests, load.longest)
    if load.rate:
        times = trace.arrivals(requests, load.rate, load.seed)
    else:
        times = [(each.at_s - requests[0].at_s) / load.speed for each in requests]
    for number, (at_s, each) in enumerate(zip(times, requests, strict=True)):
        yield Planned(number, at_s, each.num_output_tokens, _parts(each, load, number, salt))


def _parts(request: TraceRequest, load: Load, number: int, salt: str) -> tuple[Part, ...]:
    if not request.hash_ids:
        return ((f"{salt}own {load.seed} {number}", request.num_prompt_tokens),)
    last = request.num_prompt_tokens - HASH_TOKENS * (len(request.hash_ids) - 1)
    sizes = [HASH_TOKENS] * (len(request.hash_ids) - 1) + [last]
    return tuple(
        (f"{salt}block {load.seed} {hash_id}", size)
        for hash_id, size in zip(request.hash_ids, sizes, strict=True)
    )
