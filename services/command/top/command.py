"""The command: flags, whether there is a terminal, exit codes (0 done, 1 nothing can be seen, 2 a flag is
wrong)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from microserve.services.command.client.flags import endpoint_flags, find_endpoint
from microserve.services.command.shared.flags import WrongFlag
from microserve.services.command.shared.terminal import Failure, echo

if TYPE_CHECKING:
    from microserve.services.command.client.endpoint import Endpoint
    from microserve.services.command.top.picture import Picture


@click.command()
@click.option("--once", is_flag=True, help="Print one look and end; so it does where there is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one look as JSON and end.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.2, max=60),
    default=1.0,
    show_default=True,
    help="Seconds between two pictures.",
)
@endpoint_flags
def top(
    config: str | None,
    assignments: tuple[str, ...],
    url: str | None,
    api_key: str | None,
    once: bool,
    as_json: bool,
    interval_s: float,
) -> None:
    """Watch a mesh: engines, requests and where their time goes, strategies, keys, health.

    Reads /view of a gateway, for which an operator's key is needed where there are keys. Keys: ? shows them.
    """
    import asyncio

    from microserve.protocol.errors import ConfigError
    from microserve.services.command.top.link import Unseen

    endpoint = find_endpoint(url, api_key, config, assignments)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        picture = asyncio.run(_look(endpoint))
        if once or as_json or not is_terminal:
            _print(picture, endpoint, as_json=as_json)
            return
        from microserve.services.command.top.screen import Top

        Top(endpoint, picture, interval_s=interval_s).run()
    except Unseen as error:
        raise Failure(str(error)) from None
    except (ConfigError, OSError) as error:  # a certificate that cannot be read
        raise WrongFlag(str(error)) from None
    except KeyboardInterrupt:
        sys.exit(130)


async def _look(endpoint: Endpoint) -> Picture:
    import time

    from microserve.services.command.top.link import Link
    from microserve.services.command.top.picture import Picture

    link, picture = Link(endpoint), Picture()
    try:
        await link.look(picture, time.monotonic)
    finally:
        await link.close()
    return picture


def _print(picture: Picture, endpoint: Endpoint, *, as_json: bool) -> None:
    import time

    from microserve.protocol.logging.printable import printable_json
    from microserve.services.command.top.plain import as_json as json_of
    from microserve.services.command.top.plain import as_text

    now = time.monotonic()
    if as_json:
        echo(printable_json(json_of(picture, endpoint.url, now)))
    else:
        echo(as_text(picture, endpoint.url, now))
