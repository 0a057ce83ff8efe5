"""``microserve simulate``: what strategies would do with a trace, before there is any hardware.

Owns the flags. The simulation runs in a process of its own, so that services never import it.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from microserve.services.command.shared.flags import WrongFlag, parameter
from microserve.services.command.shared.terminal import Failure

if TYPE_CHECKING:
    from microserve.protocol.messages.strategy.control import Scalar

MODULE = "microserve.services.simulation.load.planner"


def _loads(_context: click.Context, _parameter: click.Parameter, text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers") from None


def _names(_context: click.Context, _parameter: click.Parameter, text: str) -> list[str]:
    return [each.strip() for each in text.split(",")] if text else []


@click.command()
@click.option("--trace", required=True, metavar="FILE", help="JSON lines in Mooncake's format, or gzip.")
@click.option(
    "--strategy",
    "strategies",
    multiple=True,
    metavar="NAME|FILE",
    help="A built-in one, or a .py file; may be repeated. [default: all that are built in]",
)
@click.option("--load", "loads", default="1,2,3,4,5", show_default=True, callback=_loads, help="Requests/s.")
@click.option("--engines", "num_engines", default=4, show_default=True, help="Engines in the mesh.")
@click.option("--labels", default="", callback=_names, help="One for each engine: prefill,decode,...")
@click.option("--profile", default="h200-8b", show_default=True, help="Kind of engine: how long steps take.")
@click.option("--link-gbps", default=0.0, help="Gbit/s between engines. [default: the profile's]")
@click.option("--requests", "num_requests", default=400, show_default=True, help="Of the trace; 0: all.")
@click.option("--longest", default=0, help="Leave out requests of more tokens. [default: none]")
@click.option("--scale", default=8, show_default=True, help="Real tokens that one simulated one stands for.")
@click.option("--seed", default=0, show_default=True, help="Of everything that goes by lot.")
@click.option(
    "--seeds", default=1, show_default=True, help="So many runs of each; medians, and what lies around."
)
@click.option(
    "--kill", multiple=True, metavar="ENGINE@T[-T]", help="An engine dies, and comes back; seconds."
)
@click.option(
    "--slow", multiple=True, metavar="ENGINE@T[-T]:FACTOR", help="An engine takes so many times longer."
)
@click.option("--lost", default=0.0, metavar="SHARE", help="Messages that never arrive. [default: 0]")
@click.option("--late", default=0.0, metavar="SHARE", help="Messages up to 0.3 s late. [default: 0]")
@click.option(
    "--max-wall", "max_wall_s", default=1800.0, show_default=True, help="End a run after so long, seconds."
)
@click.option("--jobs", default=1, show_default=True, help="Processes that simulate.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="STRATEGY.PARAMETER=VALUE",
    help="Set a strategy's parameter; may be repeated.",
)
@click.option("--slo-ttft", "slo_ttft_s", default=5.0, show_default=True, help="Goodput's bound, seconds.")
@click.option("--slo-tpot", "slo_tpot_s", default=0.05, show_default=True, help="Goodput's bound, seconds.")
@click.option("--detail", is_flag=True, help="Print TTFT by prompt length and what each engine did.")
@click.option(
    "--out", default="", metavar="FILE", help="Write JSON lines, one for each strategy, load and seed."
)
@click.option(
    "--rows", default="", metavar="FILE", help="Write a line for each request: JSON, or CSV if so named."
)
@click.option("--plot", default="", metavar="DIR", help="Draw TTFT, TPOT and JCT against load as SVG.")
def simulate(assignments: tuple[str, ...], strategies: tuple[str, ...], **flags: object) -> None:
    """Serve a trace in virtual time: TTFT, TPOT and JCT of strategies against load.

    Routers, index, schedulers and KV pools are the real ones; the time of steps and transfers is a model.
    """
    import msgspec

    from microserve.services.simulation.load.task import SimulateTask

    if find_spec("greenlet") is None:
        raise Failure("the simulation needs greenlet: pip install greenlet")
    parameters: dict[str, dict[str, Scalar]] = {}
    for assignment in assignments:
        strategy, dot, rest = assignment.partition(".")
        if not dot:
            raise WrongFlag(f"--set {assignment!r} is not STRATEGY.PARAMETER=VALUE")
        name, value = parameter(rest)
        parameters.setdefault(strategy, {})[name] = value
    fields = {"strategies": list(strategies), "parameters": parameters, **flags}
    task = msgspec.json.encode(msgspec.convert(fields, SimulateTask)).decode()
    sys.exit(subprocess.call([sys.executable, "-P", "-m", MODULE, task]))
