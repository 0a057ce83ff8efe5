"""The flags that say which server, and what is meant where they say nothing: the mesh of this directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from microserve.services.command.shared.flags import (
    Flags,
    WrongFlag,
    directory_at_hand,
    directory_flag,
    settings_flags,
)

if TYPE_CHECKING:
    from microserve.services.command.client.endpoint import Endpoint

Command = TypeVar("Command", bound=Callable[..., Any])

KEY_VARIABLE = "OPENAI_API_KEY"


def endpoint_flags(command: Command) -> Command:
    """``--url``, ``--api-key``, ``--directory``, ``--config`` and ``--set``."""
    url = click.option(
        "--url",
        metavar="URL",
        help="Any OpenAI-compatible server, with or without /v1.  [default: this directory's mesh]",
    )
    key = click.option(
        "--api-key",
        metavar="KEY",
        help=f"Its API key.  [default: the first of gateway.api_keys; with --url: ${KEY_VARIABLE}]",
    )
    return url(key(directory_flag(settings_flags(command))))


def find_endpoint(
    url: str | None, api_key: str | None, config: str | None, assignments: tuple[str, ...]
) -> Endpoint:
    """The server that the flags mean. A mesh's key is not shown to a server of another URL, nor theirs to it.

    Raises :class:`WrongFlag`."""
    from microserve.protocol.errors import ConfigError
    from microserve.services.command.client.endpoint import Endpoint
    from microserve.services.local.composition import first_key
    from microserve.services.local.directory import MeshDirectory

    key, certificate = api_key or "", ""
    if url is not None:
        key = key or os.environ.get(KEY_VARIABLE, "")
    else:
        settings = Flags(config, assignments).load()
        mesh = MeshDirectory(directory_at_hand()).running()
        gateway = settings.gateway
        scheme = "https" if gateway.tls_cert else "http"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(gateway.host, gateway.host)
        host = f"[{host}]" if ":" in host else host
        url = mesh.url if mesh is not None else f"{scheme}://{host}:{gateway.port}"
        key, certificate = key or first_key(settings), gateway.tls_cert
    try:
        return Endpoint.at(url, key, certificate)
    except ConfigError as error:
        raise WrongFlag(str(error)) from None
