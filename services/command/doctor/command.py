"""The command: looks, judges, prints. Exit code 0: nothing is wrong; 1: something is; 2: a flag is wrong."""

from __future__ import annotations

import sys

import click

from microserve.services.command.shared.flags import (
    Flags,
    WrongFlag,
    directory_at_hand,
    directory_flag,
    settings_flags,
)
from microserve.services.command.shared.terminal import echo


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quick", is_flag=True, help="Look only: let no engine send or answer.")
@click.option("--gateway", "urls", multiple=True, metavar="URL", help="One more to look at; may be repeated.")
@click.option("--index", metavar="ADDRESS", help="Where the index is.  [default: this directory's mesh's]")
@settings_flags
@directory_flag
def doctor(
    config: str | None,
    assignments: tuple[str, ...],
    index: str | None,
    urls: tuple[str, ...],
    as_json: bool,
    quick: bool,
) -> None:
    """Find out what is wrong with the mesh, as seen from this host, and how to mend it.

    Looks at every address, key, version, limit and clock, and at the gateways that routers know; measures
    each link by KV that engines send to each
    other; asks one prompt cold, cached and transferred. Needs the keys of an operator. Exit code 1 where
    something is wrong.
    """
    import asyncio

    from microserve.protocol.errors import ConfigError
    from microserve.protocol.logging.printable import printable_json
    from microserve.services.command.doctor import table
    from microserve.services.command.doctor.judging import judge
    from microserve.services.command.doctor.look import look
    from microserve.services.local.directory import MeshDirectory

    flags = Flags(config, assignments)
    flags.set("index.address", index)
    settings = flags.load_beside_mesh()

    mesh = MeshDirectory(directory_at_hand()).running()
    is_here = mesh is not None and mesh.index == settings.index.address
    asked = [*urls, *([mesh.url] if mesh is not None and is_here else [])]

    def tell(text: str) -> None:
        if not as_json and sys.stderr.isatty():
            echo(f"... {text}", err=True)

    try:
        seen = asyncio.run(look(settings, tries=not quick, tell=tell, gateways=asked))
    except ConfigError as error:
        raise WrongFlag(str(error)) from None
    findings = judge(seen)
    if as_json:
        echo(printable_json(table.as_json(seen, findings)))
    else:
        echo("\n".join(table.lines(seen, findings)))
    sys.exit(1 if findings else 0)
