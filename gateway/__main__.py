"""``python -m microserve.gateway``: the gateway as a process of its own.

Exit codes: 0 stopped by a signal, 2 a setting is wrong, 1 anything else (``service.failed``).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys

import structlog
import uvloop

from microserve.gateway.server import serve
from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings import Settings, load_settings


async def _run(settings: Settings, gateway_id: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(settings, gateway_id=gateway_id, stop=stop, environment=os.environ)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m microserve.gateway", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings")
    parser.add_argument(
        "--set", metavar="SECTION.FIELD=VALUE", action="append", default=[], dest="overrides",
        help="one setting; may be repeated, wins over file and environment",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        settings = load_settings(options.config, environment=os.environ, overrides=options.overrides)
    except ConfigError as error:
        print(f"microserve gateway: {error.detail}", file=sys.stderr)
        return 2
    gateway_id = f"gateway-{secrets.token_hex(4)}"
    file = log.configure("gateway", gateway_id, level=settings.log.level, directory=settings.log.dir)
    logger = structlog.get_logger()
    try:
        logger.info(log.SERVICE_STARTED, pid=os.getpid())
        uvloop.run(_run(settings, gateway_id))
        logger.info(log.SERVICE_STOPPED)
    except ConfigError as error:
        logger.error(log.SERVICE_FAILED, error=error.detail, field=error.field)
        if file is not None:
            print(f"microserve gateway: {error.detail}", file=sys.stderr)
        return 2
    except Exception as error:
        logger.exception(log.SERVICE_FAILED, error=str(error) or type(error).__name__)
        return 1
    finally:
        if file is not None:
            structlog.reset_defaults()
            file.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
