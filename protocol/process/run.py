"""The one runner of services: log, loop, bus, signals, watchdog, exit code.

Owns a service process from its settings to its exit; does not know what the service does. Exit codes:
0 stopped when asked, 2 a setting is wrong (one line says which), 1 anything else (``service.failed``).

SIGHUP never ends a service: its log is opened anew and settings are read again. Taken over are ``log.level``,
``log.max_mb``, ``log.keep``, ``log.max_refusals_per_s``, and what the service asks for
(``Lifecycle.on_reload``).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgspec
import structlog
import uvloop

from microserve.protocol import log
from microserve.protocol.bus.open import open_bus, require_keys
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import ConfigError
from microserve.protocol.logging.setup import Log, configure, say
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.process.limits import fill_standard_streams, raise_descriptor_limit
from microserve.protocol.process.notify import Notifier
from microserve.protocol.process.tick import until_tick
from microserve.protocol.settings.settings import Settings
from microserve.protocol.tracing.output import close_output, open_output

EXIT_STOPPED = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130

GC_THRESHOLDS = (10_000, 10, 10)
"""What a request makes is freed by counting references when it is over. Python's own 700 have the collector
look at what is still alive, again and again: a sixth of a service's time under load."""

Serve = Callable[[Settings, ZmqBus, Lifecycle], Coroutine[Any, Any, None]]
"""``run_X(settings, bus, lifecycle)``: serves until cancelled, then closes what it opened."""

_logger = structlog.get_logger()


def identify(service: str, settings: Settings) -> tuple[str, Settings]:
    """The id of this process, made up if the settings have none, and settings that hold it."""
    made_up = f"{service[0]}-{secrets.token_hex(3)}"
    if service == "engine":
        engine = msgspec.structs.replace(settings.engine, id=settings.engine.id or made_up)
        return engine.id, msgspec.structs.replace(settings, engine=engine)
    if service == "router":
        router = msgspec.structs.replace(settings.router, id=settings.router.id or made_up)
        return router.id, msgspec.structs.replace(settings, router=router)
    if service == "gateway":
        gateway = msgspec.structs.replace(settings.gateway, id=settings.gateway.id or made_up)
        return gateway.id, msgspec.structs.replace(settings, gateway=gateway)
    return made_up, settings


def run_service(
    service: str,
    settings: Settings,
    load: Callable[[], Serve],
    *,
    notifier: Notifier | None = None,
    reload: Callable[[], Settings] | None = None,
) -> int:
    """Run one service to its end in this process; returns the exit code, or ends the process with it if the
    service has asked for that (``Lifecycle.skips_exit_handlers``).

    ``load`` imports the service: late, so that a heavy import is already logged and supervised. ``reload``
    reads the settings again; None: they stay what they are.
    """
    fill_standard_streams()
    raise_descriptor_limit()
    signal.signal(signal.SIGHUP, lambda *_: None)  # until the loop takes it over
    notifier = notifier or Notifier.from_environment(os.environ)
    lifecycle = Lifecycle(notifier)
    try:
        code = _run_service(service, settings, load, lifecycle, notifier, reload or (lambda: settings))
    except BaseException:  # nobody reads the log any more, perhaps
        if not lifecycle.skips_exit_handlers:
            raise
        code = EXIT_FAILED
        with contextlib.suppress(Exception):
            traceback.print_exc()
    if lifecycle.skips_exit_handlers:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)
    return code


def _run_service(
    service: str,
    settings: Settings,
    load: Callable[[], Serve],
    lifecycle: Lifecycle,
    notifier: Notifier,
    reload: Callable[[], Settings],
) -> int:
    service_id, settings = identify(service, settings)
    try:
        lines = configure(service, service_id, settings.log)
    except ConfigError as error:
        say(f"microserve {service}: {error}")
        return EXIT_CONFIG
    try:
        lines.capture()
        _logger.info(log.SERVICE_STARTED, pid=os.getpid(), locked=bool(settings.bus.curve_dir))
        with uncollected():
            serve = load()
            open_output(service, service_id)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            serving = _serve(service, settings, serve, lifecycle, notifier, lines, reload)
            _run_to_its_end(runner.get_loop(), serving, is_up=lambda: bool(lifecycle.address))
        _logger.info(log.SERVICE_STOPPED)
        return EXIT_STOPPED
    except KeyboardInterrupt:  # before the loop took the signals over
        return EXIT_INTERRUPTED
    except Exception as error:
        cause = _cause(error)
        wrong = isinstance(cause, ConfigError)
        detail = str(cause) or type(cause).__name__
        _logger.error(log.SERVICE_FAILED, error=detail, exc_info=None if wrong else cause)
        if settings.log.dir:
            say(f"microserve {service}: {detail}")
        return EXIT_CONFIG if wrong else EXIT_FAILED
    finally:
        close_output()
        lines.close()
        notifier.close()


def _run_to_its_end(
    loop: asyncio.AbstractEventLoop, serving: Coroutine[Any, Any, None], *, is_up: Callable[[], bool]
) -> None:
    """Once the service is up, only it ends its loop: not what some task or callback raises to leave the
    process (asyncio lets that through), nor one that stops the loop."""
    task = loop.create_task(serving)
    while True:
        try:
            return loop.run_until_complete(task)
        except (SystemExit, KeyboardInterrupt, RuntimeError) as error:
            if task.done() or loop.is_closed() or not is_up():
                raise
            _logger.error(log.TASK_FAILED, task="", detail="wanted to end the process", exc_info=error)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Of what an import makes nothing is garbage, and the collector would look at all of it again and again:
    a fifth of the time that a large one takes. What is there in the end it never looks at any more."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        gc.enable()


def _cause(error: Exception) -> Exception:
    """What task groups have wrapped: a wrong setting anywhere in it, else a single failure, else all."""
    if isinstance(error, ExceptionGroup):
        wrong, _ = error.split(ConfigError)
        error = wrong or error
        while isinstance(error, ExceptionGroup) and (wrong or len(error.exceptions) == 1):
            error = error.exceptions[0]
    return error


async def _serve(
    service: str,
    settings: Settings,
    serve: Serve,
    lifecycle: Lifecycle,
    notifier: Notifier,
    lines: Log,
    reload: Callable[[], Settings],
) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_tell_failure)
    loop.add_signal_handler(signal.SIGHUP, _reload, lifecycle, lines, reload)
    require_keys(settings)
    bus = open_bus(settings, service)
    try:
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(serve(settings, bus, lifecycle))
            watchdog = group.create_task(feed_watchdog(lifecycle, notifier))
            serving.add_done_callback(lambda _: watchdog.cancel())
            _stop_on_signals(serving, notifier)
    finally:
        bus.close()


def _reload(lifecycle: Lifecycle, lines: Log, read: Callable[[], Settings]) -> None:
    """Whatever is wrong with the settings: those before stay, and the log is opened anew."""
    try:
        settings = read()
    except Exception as error:
        lines.reopen()
        _logger.error(log.SETTINGS_REJECTED, error=str(error))
        return
    lines.reconfigure(settings.log)
    lifecycle.reload(settings)
    _logger.info(log.SETTINGS_RELOADED, log_level=settings.log.level)


def _tell_failure(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Of a task or a callback that nobody waits for: one of a strategy's own, perhaps."""
    task = context.get("task") or context.get("future")
    name = task.get_name() if isinstance(task, asyncio.Task) else ""
    detail = str(context.get("message", ""))
    _logger.error(log.TASK_FAILED, task=name, detail=detail, exc_info=context.get("exception"))


def _stop_on_signals(service: asyncio.Task[None], notifier: Notifier) -> None:
    """SIGTERM and Ctrl-C cancel the service, once; Ctrl-C again gives up on a clean end."""
    loop = asyncio.get_running_loop()
    asked = False

    def stop(number: int) -> None:
        nonlocal asked
        if asked:
            if number == signal.SIGINT:
                os._exit(EXIT_INTERRUPTED)
            return
        asked = True
        notifier.send("STOPPING=1")
        service.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)


async def feed_watchdog(lifecycle: Lifecycle, notifier: Notifier) -> None:
    """Ping three times a period, all of a machine at the same moments, but only when the loop was on time and
    the service says that it is well.

    Two pings may be lost without harm; a loop that lags by half an interval withholds its ping.
    """
    if notifier.watchdog_s <= 0:
        return
    loop = asyncio.get_running_loop()
    interval_s = notifier.watchdog_s / 3
    while True:
        left_s = until_tick(loop.time(), interval_s)
        due = loop.time() + left_s
        await asyncio.sleep(left_s)
        if loop.time() - due < interval_s / 2 and lifecycle.healthy():
            notifier.send("WATCHDOG=1")
