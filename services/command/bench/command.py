"""The command: flags, what is said meanwhile, exit codes (0 done, 1 failed or not to be believed, 2 a flag is
wrong, 130 Ctrl-C)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from microserve.services.command.client.flags import endpoint_flags, find_endpoint
from microserve.services.command.shared.flags import WrongFlag
from microserve.services.command.shared.terminal import Failure, echo

if TYPE_CHECKING:
    from microserve.services.command.bench.task import Load

POSITIVE = click.FloatRange(min=0, min_open=True)
COUNT = click.IntRange(min=1)


@click.command()
@click.argument("more_objectives", nargs=-1, metavar="")
@click.option("--endpoint", type=click.Choice(["chat", "completions"]), default="chat", show_default=True)
@click.option("--model", default="", help="Whom to ask.  [default: the first that the server has]")
@click.option("--num-requests", "-n", type=COUNT, help="[default: 100, or all of a trace]")
@click.option("--duration", "duration_s", type=POSITIVE, help="Send for so many seconds instead.")
@click.option("--rate", type=POSITIVE, help="Requests/s on average.  [default: all at once]")
@click.option(
    "--arrival",
    type=click.Choice(["poisson", "constant", "bursts"]),
    default="poisson",
    show_default=True,
    help="How they come at that rate.",
)
@click.option(
    "--burstiness",
    type=POSITIVE,
    default=0.25,
    show_default=True,
    help="Of bursts: the gamma distribution's shape; 1 is Poisson, less is burstier.",
)
@click.option("--concurrency", type=COUNT, help="At most so many at a time; the others wait.")
@click.option(
    "--lengths",
    type=click.Choice(["fixed", "uniform", "lognormal", "sharegpt"]),
    default="fixed",
    show_default=True,
    help="Of prompts and answers, around --input-len and --output-len; sharegpt: as people's chats.",
)
@click.option("--input-len", type=COUNT, default=512, show_default=True, help="Tokens of a prompt.")
@click.option("--output-len", type=COUNT, default=128, show_default=True, help="Tokens of an answer.")
@click.option(
    "--spread",
    type=click.FloatRange(min=0),
    help="Uniform: up and down by this part of it [0.5]; log-normal: sigma [0.5].",
)
@click.option("--prefix-len", type=click.IntRange(min=0), default=0, help="Tokens that prompts share first.")
@click.option("--num-prefixes", type=COUNT, default=1, show_default=True, help="Of them, in turn.")
@click.option("--trace", metavar="FILE", help="Mooncake's JSON lines, or Azure's .csv, at their own times.")
@click.option("--speed", type=POSITIVE, default=1.0, show_default=True, help="Of the trace's clock.")
@click.option("--longest", type=COUNT, help="Leave out a trace's requests of more tokens.")
@click.option("--file", metavar="FILE", help='JSON lines: {"prompt" or "messages", "max_tokens"}.')
@click.option(
    "--ignore-eos/--no-ignore-eos", default=None, help="Answers as long as asked.  [default: unless --file]"
)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option("--strategy", default="", help="Header x-microserve-strategy of every request.")
@click.option("--timeout", "timeout_s", type=POSITIVE, default=600.0, show_default=True, help="A request's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of lengths, words and times.")
@click.option(
    "--goodput",
    "objectives",
    multiple=True,
    metavar="NAME:MS...",
    help="Objectives: ttft:500 tpot:50 e2el:9000; counts the requests within all of them.",
)
@click.option("--percentiles", default="99", show_default=True, help="To print: 50,90,99.")
@click.option("--warmup", type=click.IntRange(min=0), default=4, show_default=True, help="Requests before.")
@click.option("--processes", type=COUNT, default=1, show_default=True, help="That send.")
@click.option("--json", "json_path", metavar="FILE", help="Write all figures, and a row a request.")
@click.option("--plot", "plot_path", metavar="FILE.png", help="Draw them.")
@click.option("--force", is_flag=True, help="Report, marked, even where this program was the bottleneck.")
@click.option("--max-lag-ms", type=click.FloatRange(min=0), default=10.0, show_default=True)
@click.option("--max-slip-ms", type=click.FloatRange(min=0), default=20.0, show_default=True)
@endpoint_flags
def bench(
    config: str | None,
    assignments: tuple[str, ...],
    url: str | None,
    api_key: str | None,
    more_objectives: tuple[str, ...],
    objectives: tuple[str, ...],
    percentiles: str,
    num_requests: int | None,
    duration_s: float | None,
    ignore_eos: bool | None,
    warmup: int,
    processes: int,
    json_path: str | None,
    plot_path: str | None,
    force: bool,
    max_lag_ms: float,
    max_slip_ms: float,
    **fields: Any,
) -> None:
    """Send requests as they would come, and say how they fared: TTFT, TPOT, ITL, throughput, goodput.

    Prints the table of `vllm bench serve`. Refuses to where it was itself too slow to measure.
    """
    if more_objectives and not objectives:
        raise click.UsageError(f"Got unexpected extra argument ({more_objectives[0]})")
    load = load_of(fields, num_requests, duration_s, ignore_eos)
    wanted_ms = objectives_of([*objectives, *more_objectives])
    shown = percentiles_of(percentiles)
    endpoint = find_endpoint(url, api_key, config, assignments)
    from microserve.protocol.errors import ConfigError
    from microserve.services.command.bench.health import Limits
    from microserve.services.command.bench.run import NotServed, Outputs, bench_with

    outputs = Outputs(json_path or "", plot_path or "", shown, wanted_ms, force)
    try:
        believed = bench_with(
            endpoint, load, outputs, Limits(max_lag_ms, max_slip_ms), warmup=warmup, num_processes=processes
        )
    except ConfigError as error:
        raise WrongFlag(str(error)) from None
    except NotServed as error:
        raise Failure(str(error)) from None
    except KeyboardInterrupt:
        echo("\nstopped; a part of a run is not reported", err=True)
        sys.exit(130)
    sys.exit(0 if believed else 1)


def load_of(
    fields: dict[str, Any], num_requests: int | None, duration_s: float | None, ignore_eos: bool | None
) -> Load:
    """Raises :class:`WrongFlag`."""
    from microserve.services.command.bench.task import BURSTS, FIXED, SHAREGPT, UNIFORM, Load

    given = {name: value for name, value in fields.items() if value is not None}
    if given.get("trace") and given.get("file"):
        raise WrongFlag("--trace or --file, one of them")
    spread = given.setdefault("spread", 0.0 if given["lengths"] in (FIXED, SHAREGPT) else 0.5)
    if given["lengths"] == UNIFORM and spread > 1:
        raise WrongFlag("--spread is at most 1 with --lengths uniform")
    if given["arrival"] != BURSTS:
        given["burstiness"] = 1.0
    elif "rate" not in given:
        raise WrongFlag("--arrival bursts needs --rate")
    if duration_s and not (given.get("rate") or given.get("concurrency") or given.get("trace")):
        raise WrongFlag("--duration needs --rate, --concurrency or --trace: else all comes at once")
    if num_requests is None:
        num_requests = 0 if duration_s or given.get("trace") else 100
    is_free = bool(given.get("file"))
    return Load(
        **given,
        num_requests=num_requests,
        duration_s=duration_s or 0.0,
        ignore_eos=not is_free if ignore_eos is None else ignore_eos,
    )


def objectives_of(texts: list[str]) -> dict[str, float]:
    """``ttft:500`` and so on, in ms. Raises :class:`WrongFlag`."""
    from microserve.services.command.bench.report import SLO_METRICS

    found: dict[str, float] = {}
    for text in " ".join(texts).replace(",", " ").split():
        name, _, bound = text.partition(":")
        try:
            found[name] = float(bound)
        except ValueError:
            found[name] = -1.0
        if name not in SLO_METRICS or not found[name] >= 0:
            raise WrongFlag(f"--goodput {text!r} is not NAME:MS with a NAME of {', '.join(SLO_METRICS)}")
    return found


def percentiles_of(text: str) -> tuple[float, ...]:
    """Raises :class:`WrongFlag`."""
    try:
        found = tuple(float(each) for each in text.split(","))
    except ValueError:
        found = (-1.0,)
    if not all(0 <= each <= 100 for each in found):
        raise WrongFlag(f"--percentiles {text!r} are not numbers from 0 to 100")
    return found
