"""Asks gateways over HTTP whether they serve: ``/ready``, which needs no key of the API.

Owns which URLs are tried from here, and how an answer is read. Judges nothing (judging_gateways.py).
"""

from __future__ import annotations

import asyncio
import socket as sockets
import ssl
import time
from collections.abc import Iterable, Sequence

import msgspec

from microserve.protocol.bus.address import is_out_of_reach
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.host import HostFacts
from microserve.services.command.client.endpoint import Endpoint
from microserve.services.command.client.http import Client
from microserve.services.command.doctor.observation import GatewaySeen, HostSeen, Place, Reach

ASK_S = 5.0


class _Router(msgspec.Struct):
    alive: bool = False
    num_engines: int = 0


class _Ready(msgspec.Struct):
    ready: bool
    draining: bool = False
    routers: list[_Router] = []
    version: str = ""
    time: float = 0.0


def urls_from_here(told: Iterable[str], asked: Sequence[str], index: str) -> list[str]:
    """Each once, ``asked`` first: those that somebody named here, and of those that routers were ``told`` by
    gateways not the ones that another host alone reaches. ``index``: its address, where routers are about."""
    near = [url for url in told if not is_out_of_reach(f"tcp://{url.partition('://')[2]}", index)]
    return [*dict.fromkeys([*(url.rstrip("/") for url in asked if url), *near])]


async def ask_gateway(url: str, tls_cert: str) -> GatewaySeen:
    """``tls_cert``: as the settings of a gateway here have it. Never raises for what is there."""
    try:
        endpoint = Endpoint.at(url, tls_cert=tls_cert)
        place = await asyncio.to_thread(_connect, endpoint)
        if place.reach is not Reach.REACHED:
            return GatewaySeen(url, place)
        client = Client(endpoint, connect_timeout_s=ASK_S)
    except (ConfigError, OSError) as error:  # OSError: a certificate's file
        return GatewaySeen(url, Place("HTTP", url, Reach.NO_ADDRESS, str(error)))
    try:
        began = time.time()
        async with asyncio.timeout(ASK_S):
            status, body = await client.fetch("GET", "/ready")
        return _read(url, place, status, body, began, time.time())
    except TimeoutError:
        return GatewaySeen(url, place, error=f"no answer to /ready within {ASK_S:g} s")
    except ConnectionError as error:
        return GatewaySeen(url, place, error=str(error))
    finally:
        await client.close()


def _connect(endpoint: Endpoint) -> Place:
    try:
        sockets.create_connection((endpoint.host, endpoint.port), timeout=ASK_S).close()
    except sockets.gaierror as error:
        what = f"{endpoint.host} is nobody's name here ({error.strerror})"
        return Place("HTTP", endpoint.url, Reach.NO_ADDRESS, what)
    except UnicodeError as error:  # no name can be so
        return Place("HTTP", endpoint.url, Reach.NO_ADDRESS, str(error))
    except ConnectionRefusedError:
        return Place("HTTP", endpoint.url, Reach.REFUSED)
    except (OSError, ssl.SSLError) as error:
        return Place("HTTP", endpoint.url, Reach.SILENT, error.strerror or "no answer in time")
    return Place("HTTP", endpoint.url)


def _read(url: str, place: Place, status: int, body: bytes, began: float, ended: float) -> GatewaySeen:
    """An older gateway says neither its version nor the time."""
    try:
        said = msgspec.json.decode(body, type=_Ready)
    except msgspec.DecodeError:
        return GatewaySeen(url, place, error=f"/ready answers {status} and is no gateway's")
    host = None
    if said.time:
        off_s, uncertain_s = said.time - (began + ended) / 2, (ended - began) / 2
        host = HostSeen(f"gateway {url}", HostFacts(wall_s=said.time), off_s, uncertain_s)
    why = ""
    if said.draining:
        why = "it stops, and takes nothing new"
    elif not said.ready:
        alive = [router for router in said.routers if router.alive]
        if not alive:
            why = f"none of its {len(said.routers)} routers answers it"
        elif not any(router.num_engines for router in alive):
            why = "its routers have no engine"
        else:
            why = "its routers' engines serve another model"
    return GatewaySeen(url, place, said.version, host, unready=why)
