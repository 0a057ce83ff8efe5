"""``microserve engine``, ``index``, ``router`` and ``gateway``: one service in this process.

Owns their flags, and which function runs; how a service is run is protocol/process/run.py's. What is run is
imported once the settings are known to be right.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from microserve.services.command.model.flags import model_flags, with_model
from microserve.services.command.serve.backend import RUNS, enter_environment, load_engine
from microserve.services.command.shared.flags import (
    Flags,
    WrongFlag,
    directory_at_hand,
    directory_flag,
    settings_flags,
)

if TYPE_CHECKING:
    from microserve.protocol.process.run import Serve
    from microserve.protocol.settings.settings import Settings


def _run(
    service: str,
    flags: Flags,
    load: Callable[[], Serve],
    *,
    settings: Settings | None = None,
) -> None:
    settings = settings or flags.load()
    if service in ("engine", "gateway"):
        computes = service == "engine" and settings.engine.backend != "vllm-serve"
        settings = with_model(settings, weights=computes)
    from microserve.protocol.process.run import run_service

    code = run_service(service, settings, load, reload=flags.load)
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, perhaps
        sys.stdout.flush()
        sys.stderr.flush()
    # Everything of ours is closed; taking torch down as well would cost seconds at every stop and restart.
    os._exit(code)


@click.command()
@model_flags("Model directory, or its name at the Hub (model.path).")
@click.option("--id", "own_id", help="Name of this engine in the mesh (engine.id).")
@click.option(
    "--backend", type=click.Choice(list(RUNS)), help="What computes (engine.backend).  [default: native]"
)
@click.option("--device", metavar="cpu|cuda:N", help="Where it computes (engine.device).")
@click.option("--load-format", metavar="auto|random", help="Weights, or random ones (model.load_format).")
@directory_flag
@settings_flags
def engine(
    config: str | None,
    assignments: tuple[str, ...],
    model: str | None,
    own_id: str | None,
    backend: str | None,
    device: str | None,
    load_format: str | None,
) -> None:
    """Run an engine: it holds the model and the KV cache.

    In the directory of a mesh that `up` runs it joins that mesh, unless index.address says otherwise.
    """
    flags = Flags(config, assignments)
    flags.set("model.path", model)
    flags.set("engine.id", own_id)
    flags.set("engine.backend", backend)
    flags.set("engine.device", device)
    flags.set("model.load_format", load_format)
    settings = flags.load_beside_mesh()
    directory = ["--directory", str(directory_at_hand())]
    enter_environment(settings, ["engine", *flags.as_arguments(), *directory])
    _run("engine", flags, functools.partial(load_engine, settings.engine.backend), settings=settings)


@click.command()
@settings_flags
def index(config: str | None, assignments: tuple[str, ...]) -> None:
    """Run the index: who is in the mesh, and who holds which prefix."""

    def load() -> Serve:
        from microserve.services.index.service import run_index

        return run_index

    _run("index", Flags(config, assignments), load)


@click.command()
@click.option("--strategy", help="Strategy of requests that name none (router.default_strategy).")
@settings_flags
def router(config: str | None, assignments: tuple[str, ...], strategy: str | None) -> None:
    """Run a router: it serves requests by strategies."""
    flags = Flags(config, assignments)
    flags.set("router.default_strategy", strategy)

    def load() -> Serve:
        from microserve.services.router.service import run_router

        return run_router

    _run("router", flags, load)


@click.command()
@click.option("--host", help="Address to listen on (gateway.host).")
@click.option("--port", type=int, help="Port to listen on (gateway.port).")
@click.option("--workers", type=int, help="Processes that share the port (gateway.workers).")
@click.option("--worker", type=int, hidden=True, help="Be that one of them.")
@settings_flags
def gateway(
    config: str | None, assignments: tuple[str, ...], worker: int | None, **given: str | int | None
) -> None:
    """Run a gateway: the OpenAI API over HTTP."""
    flags = Flags(config, assignments)
    for name, value in given.items():
        flags.set(f"gateway.{name}", value)
    settings = _settings_of(flags, worker)
    _run("gateway", flags, functools.partial(_load_gateway, flags, settings, worker), settings=settings)


def _settings_of(flags: Flags, worker: int | None) -> Settings:
    """As ``flags`` say, of worker number ``worker`` if it is one. Raises :class:`WrongFlag`."""
    from microserve.protocol.errors import ConfigError
    from microserve.protocol.process.run import identify

    settings = flags.load()
    if worker is not None:
        from microserve.gateway.worker import settings_of_worker

        try:
            settings = settings_of_worker(settings, worker)
        except ConfigError as error:
            raise WrongFlag(str(error)) from None
    return identify("gateway", settings)[1]


def _load_gateway(flags: Flags, settings: Settings, worker: int | None) -> Serve:
    """What is to be run; imports it."""
    if worker is None and settings.gateway.workers > 1:
        from microserve.services.local.gateway_workers import run_workers

        return functools.partial(run_workers, flags=flags.as_arguments())
    from microserve.gateway.server import run_gateway

    return functools.partial(run_gateway, worker=worker)
