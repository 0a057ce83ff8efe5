"""The command: flags, what is said, exit codes (0 done, 1 failed, 2 a flag or the workload is wrong, 130
Ctrl-C)."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import click

from microserve.services.command.model.flags import model_flags, told, with_model
from microserve.services.command.shared.flags import Flags, WrongFlag, settings_flags
from microserve.services.command.shared.terminal import Failure, echo

COUNT = click.IntRange(min=1)
NEEDED = {"torch": ".[engine]", "transformers": ".[engine]", "sklearn": ".[profile]"}


@click.command()
@click.option("--file", required=True, metavar="FILE", help='JSON lines: {"prompt" or "messages", "answer"}.')
@click.option("--out", required=True, metavar="FILE", help="Library to write (engine.codec_library).")
@click.option(
    "--endpoint",
    type=click.Choice(["chat", "completions"]),
    default="chat",
    show_default=True,
    help="A prompt is a user's message, or a text to go on with.",
)
@click.option(
    "--space",
    type=click.Choice(["wide", "paper", "small"]),
    default="wide",
    show_default=True,
    help="Of profiles: 338 ways to lose, KVServe's grid of 144, or 9.",
)
@click.option("--exhaustive", is_flag=True, help="Measure all of the space instead of searching it.")
@click.option("--random", "by_lot", is_flag=True, help="Measure some of it by lot: to compare with.")
@click.option("--most", type=COUNT, default=60, show_default=True, help="Ways that a search measures.")
@click.option(
    "--floor",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="Least fidelity, exp(-KL) of next tokens, of what is kept.",
)
@click.option("--prompts", "num_prompts", type=COUNT, help="Of the file, by lot.  [default: all]")
@click.option("--longest", type=COUNT, default=2048, show_default=True, help="Leave out longer prompts.")
@click.option("--next", "num_next", type=COUNT, default=16, show_default=True, help="Tokens compared.")
@click.option("--repeats", type=COUNT, default=7, show_default=True, help="Of a timing; the least counts.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything that goes by lot.")
@model_flags("Model directory, or its name at the Hub (model.path); default: the demo model.")
@settings_flags
def profile(
    config: str | None,
    assignments: tuple[str, ...],
    model: str | None,
    endpoint: str,
    exhaustive: bool,
    by_lot: bool,
    num_prompts: int | None,
    file: str,
    out: str,
    space: str,
    most: int,
    floor: float,
    longest: int,
    num_next: int,
    repeats: int,
    seed: int,
) -> None:
    """Measure what ways of making KV small bring, cost and lose; write the best as a library.

    Broken off, it goes on where it was when it is called again: what it has measured is in FILE.measured.
    """
    if exhaustive and by_lot:
        raise WrongFlag("--exhaustive or --random, one of them")
    for name, extra in NEEDED.items():
        if find_spec(name) is None:
            raise Failure(f"no {name}; this needs: pip install '{extra}' in a checkout")
    flags = Flags(config, assignments)
    flags.set("model.path", model)
    settings = flags.load()
    import msgspec

    from microserve.protocol.errors import ConfigError
    from microserve.services.command.profile.task import BAYES, EXHAUSTIVE, LOT, Task

    if not settings.model.path:
        with told() as view:
            import os

            from microserve.services.local.demo.model import default_cache, fetch

            demo = str(fetch(default_cache(os.environ), view.progress))
        settings = msgspec.structs.replace(settings, model=msgspec.structs.replace(settings.model, path=demo))
    settings = with_model(settings, weights=True)
    task = Task(
        file=file,
        out=out,
        as_chat=endpoint == "chat",
        space=space,
        method=EXHAUSTIVE if exhaustive else LOT if by_lot else BAYES,
        floor=floor,
        most=most,
        num_prompts=num_prompts or 0,
        longest=longest,
        num_next=num_next,
        repeats=repeats,
        seed=seed,
    )
    from microserve.kvcache.codec.library import save
    from microserve.services.command.profile.report import table
    from microserve.services.command.profile.run import profile_model

    try:
        with told() as view:
            found = profile_model(settings, task, view.progress)
        save(found.library, out)
    except ConfigError as error:
        raise WrongFlag(str(error)) from None
    except OSError as error:
        raise Failure(f"cannot write {out}: {error.strerror}") from None
    except KeyboardInterrupt:
        echo(f"\nstopped; what was measured is in {out}.measured, and the same command goes on", err=True)
        sys.exit(130)
    echo("\n".join(table(found.library)))
    echo(f"{found.num_measured} of {found.num_candidates} ways measured; written to {out}")
