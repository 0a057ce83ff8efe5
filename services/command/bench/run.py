"""A run from its first question to its report: who is asked, a warm-up, the load, a verdict, what is
written."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.protocol.logging.printable import printable_json
from microserve.services.command.bench.health import Limits, Verdict, judge
from microserve.services.command.bench.load import CLOCK, prepared, run, send_share, warm_up
from microserve.services.command.bench.report import Figures, as_json, summarise, table
from microserve.services.command.bench.task import Load, Outcome, Result, Share, Words
from microserve.services.command.bench.worker import WorkerLost, run_workers
from microserve.services.command.bench.workload.plan import plan
from microserve.services.command.bench.workload.prompts import WORDS
from microserve.services.command.client.chunk import error_in
from microserve.services.command.client.endpoint import Endpoint
from microserve.services.command.client.http import Client
from microserve.services.command.shared.terminal import echo

NUM_SAMPLE = 2000
"""Words that the server counts for us."""


class NotServed(Exception):
    """The server cannot be asked, or serves nothing."""


@dataclass(frozen=True, slots=True)
class Outputs:
    json_path: str
    plot_path: str
    percentiles: tuple[float, ...]
    objectives_ms: dict[str, float]
    force: bool
    """Report even what is not to be believed."""


def bench_with(
    endpoint: Endpoint, load: Load, outputs: Outputs, limits: Limits, *, warmup: int, num_processes: int
) -> bool:
    """Whether the report is to be believed. Raises :class:`ConfigError` and :class:`NotServed`."""
    if outputs.plot_path and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib", field="plot")
    first = next(plan(load), None)  # a wrong file is known before anything is sent
    if first is None:
        raise ConfigError("there is nothing to send")
    load, words = run(_ask(endpoint, load))
    echo(_about(endpoint, load, words), err=True)
    if warmup:
        _warm(endpoint, load, words, warmup)
    began_s, results = _send(endpoint, load, words, num_processes)
    outcomes = sorted((each for result in results for each in result.outcomes), key=lambda each: each.number)
    verdict = judge([result.health for result in results], outcomes, limits)
    figures = summarise(outcomes, began_s, outputs.objectives_ms)
    return _report(load, figures, outcomes, began_s, verdict, outputs)


async def _ask(endpoint: Endpoint, load: Load) -> tuple[Load, Words]:
    """The model's name, and what prompts are made of."""
    client = Client(endpoint)
    try:
        status, body = await client.fetch("GET", "/v1/models")
        if status != 200:
            raise NotServed(f"{endpoint.url}/v1/models answered {status}: {error_in(body)}")
        names = [str(each["id"]) for each in msgspec.json.decode(body)["data"]]
        if not names:
            raise NotServed(f"{endpoint.url} serves no model")
        if load.model and load.model not in names:
            raise NotServed(f"{endpoint.url} has no model {load.model!r}, but {', '.join(names)}")
        load = msgspec.structs.replace(load, model=load.model or names[0])
        return load, await _words(client, load)
    except ConnectionError as error:
        raise NotServed(str(error)) from None
    except (ValueError, KeyError, TypeError):
        raise NotServed(f"{endpoint.url}/v1/models does not list models") from None
    finally:
        await client.close()


async def _words(client: Client, load: Load) -> Words:
    """Ids that the server's tokenizer makes of our words, and how many it makes of one; a server without
    ``/tokenize`` gets words."""
    text = " ".join(random.Random("sample").choices(WORDS, k=NUM_SAMPLE))
    question = msgspec.json.encode({"model": load.model, "prompt": text, "add_special_tokens": False})
    status, body = await client.fetch("POST", "/tokenize", question)
    if status != 200:
        return Words()
    try:
        ids = [int(each) for each in msgspec.json.decode(body)["tokens"]]
    except (ValueError, KeyError, TypeError):
        return Words()
    if not ids:
        return Words()
    return Words(sorted(set(ids)), len(ids) / NUM_SAMPLE, is_measured=True)


def _about(endpoint: Endpoint, load: Load, words: Words) -> str:
    when = f"{load.rate:g} requests/s ({load.arrival})" if load.rate else "all at once"
    if load.trace:
        when = f"as {load.trace} says" + (f", {load.rate:g} requests/s" if load.rate else "")
    most = f", {load.concurrency} at a time" if load.concurrency else ""
    counted = "" if words.is_measured else "; prompts are of about that length: it has no /tokenize"
    return f"{endpoint.url}  {load.model}  {load.endpoint}  {when}{most}{counted}"


def _warm(endpoint: Endpoint, load: Load, words: Words, count: int) -> None:
    began_s = CLOCK()
    outcomes = run(warm_up(endpoint, load, words, count, "warm-up "))
    failed = [each for each in outcomes if each.fault]
    if failed and len(failed) == len(outcomes):
        raise NotServed(f"warming up failed: {failed[0].fault}: {failed[0].detail}")
    echo(f"warmed up: {len(outcomes)} requests in {CLOCK() - began_s:.1f} s, not in the figures", err=True)


def _send(endpoint: Endpoint, load: Load, words: Words, num_processes: int) -> tuple[float, Sequence[Result]]:
    if num_processes > 1:
        if 0 < load.concurrency < num_processes:
            raise ConfigError("--concurrency is less than --processes", field="concurrency")
        try:
            return run_workers(endpoint, load, words, num_processes)
        except WorkerLost as error:
            raise NotServed(str(error)) from None
    progress = _Progress(load)
    try:
        with prepared():
            start_s = CLOCK()
            return start_s, [run(send_share(endpoint, load, words, Share(), start_s, progress.told))]
    finally:
        progress.close()


class _Progress:
    """One line on a terminal; nothing elsewhere."""

    def __init__(self, load: Load) -> None:
        self._of = f" of {load.num_requests}" if load.num_requests else ""
        self._num_done = self._num_failed = 0
        self._shown_s = CLOCK()
        self._is_shown = sys.stderr.isatty()

    def told(self, outcome: Outcome) -> None:
        self._num_done += 1
        self._num_failed += bool(outcome.fault)
        if self._is_shown and CLOCK() - self._shown_s > 1.0:
            self._shown_s = CLOCK()
            failed = f", {self._num_failed} failed" if self._num_failed else ""
            echo(f"{self._num_done}{self._of} answered{failed}", err=True)

    def close(self) -> None:
        if self._is_shown and self._num_done:
            echo(f"{self._num_done}{self._of} answered", err=True)


def _report(
    load: Load,
    figures: Figures,
    outcomes: Sequence[Outcome],
    began_s: float,
    verdict: Verdict,
    outputs: Outputs,
) -> bool:
    if verdict.complaints:
        echo("Error: the load generator itself was the bottleneck:", err=True)
        for each in verdict.complaints:
            echo(f"  {each}", err=True)
        if not outputs.force:
            echo("nothing is reported; --force reports it all the same, marked", err=True)
            return False
    mark = "NOT VALID: the load generator was the bottleneck"
    lines = table(figures, load, outputs.percentiles)
    if verdict.complaints:
        lines = [mark, *lines, *(f"  {each}" for each in verdict.complaints), mark]
    echo("\n".join([*lines, *_notes(figures, verdict)]))
    if outputs.json_path:
        body = as_json(figures, load, outcomes, verdict.complaints)
        body |= {"load": msgspec.to_builtins(load), "generator": msgspec.to_builtins(verdict)}
        _write(outputs.json_path, printable_json(body))
    if outputs.plot_path:
        from microserve.services.command.bench.plot import draw

        title = f"{load.model}, {load.rate:g} requests/s" if load.rate else load.model
        try:
            draw(outputs.plot_path, figures, outcomes, began_s, mark if verdict.complaints else title)
        except (OSError, ValueError) as error:
            raise NotServed(f"cannot draw {outputs.plot_path}: {error}") from None
    return not verdict.complaints and figures.completed > 0


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise NotServed(f"cannot write {path}: {error.strerror}") from None


def _notes(figures: Figures, verdict: Verdict) -> list[str]:
    """What the table has no place for."""
    lines = [
        f"failed: {count} x {kind}: {figures.examples[kind]}" for kind, count in figures.failures.items()
    ]
    if figures.held_s > 0.001:
        lines.append(f"held back by --concurrency: {figures.held_s * 1000:.1f} ms a request on average")
    lines.append(
        f"load generator: loop {verdict.lag_p99_ms:.1f} ms late (p99), requests {verdict.slip_p99_ms:.1f} ms "
        f"(p99), {verdict.cpu_share:.0%} of a core in {verdict.num_processes} process"
        + ("es" if verdict.num_processes > 1 else "")
    )
    return lines
